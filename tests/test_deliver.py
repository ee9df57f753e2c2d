"""What is written does not fold, or says so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithm.deliver import write_unfolded
from algorithm.geometry import Affine, Grid, jacobian_determinant
from algorithm.images import read_field
from algorithm.lungs import LungMask
from algorithm.report import Report
from algorithm.transform import Transform
from tests.strategies import smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

COARSE = Grid((16, 14, 12), (4.0, 4.0, 4.0), (-30.0, -20.0, 100.0))
OUTPUT = Grid((40, 30, 21), (1.5, 1.9, 2.4), (-28.0, -19.0, 99.0), ((0.8, -0.6, 0.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0)))
LUNGS = LungMask(torch.ones(1, 1, *COARSE.shape, dtype=torch.bool), COARSE)


def smallest_written(path: Path) -> float:
    """The smallest determinant of the field in the file, by `jacobian_determinant`."""
    field, grid = read_field(path)
    return float(jacobian_determinant(field.double(), grid).min())


def spikes() -> Tensor:
    u = smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0))
    u[0, :, 6, 7, 8] += 15.0
    u[0, 2, 3, 3, 3] -= 20.0
    return u


def test_a_smooth_field_is_written_as_it_is(tmp_path: Path) -> None:
    report, transform = Report(), Transform(smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0)), COARSE)
    assert write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, "itk", report) is transform
    jacobian = report.to_dict()["jacobian"]
    assert jacobian["jacobian_min_everywhere"] == pytest.approx(smallest_written(tmp_path / "u.mha"), abs=1e-4)
    assert jacobian["folded_voxels"] == 0 and report.to_dict()["warnings"] == []


@pytest.mark.parametrize("layout", ["itk", "grand-challenge"])
def test_a_field_that_folds_is_repaired_before_it_is_left(tmp_path: Path, layout: str) -> None:
    report, transform = Report(), Transform(spikes(), COARSE, Affine.from_arrays(np.eye(3) * 1.1, np.zeros(3)))
    folded = transform.field(OUTPUT)
    assert (jacobian_determinant(folded, OUTPUT) <= 0).any()
    written = write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, layout, report)
    assert smallest_written(tmp_path / "u.mha") > 0
    said = report.to_dict()
    assert said["jacobian"]["folded_voxels"] == 0
    assert all("smoothed" in warning for warning in said["warnings"]) and said["warnings"]
    changed = (written.displacement != transform.displacement).any(dim=1)
    assert 0 < changed.float().mean() < 0.5


def test_what_cannot_be_repaired_is_said_with_the_count(tmp_path: Path) -> None:
    """A pre-alignment that mirrors: no field in front of it helps."""
    mirror = Affine.from_arrays(np.diag([-1.0, 1.0, 1.0]), np.zeros(3))
    report, transform = Report(), Transform(torch.zeros(1, 3, *COARSE.shape), COARSE, mirror)
    write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, "itk", report)
    said = report.to_dict()
    assert said["jacobian"]["folded_voxels"] == OUTPUT.size[0] * OUTPUT.size[1] * OUTPUT.size[2]
    warning = said["warnings"][-1]
    assert str(said["jacobian"]["folded_voxels"]) in warning and "repair failed" in warning
