"""``lungreg 4d``: a sequence with known motion. The maps are exact, so that the ITV can be told to a voxel."""

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.api import Registration
from algorithm.errors import InputError
from algorithm.fields.frame import framed
from algorithm.fields.inverse import inverse
from algorithm.fields.transform import Transform
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Grid
from algorithm.results.result import Result
from algorithm.tools.sequence import find_phases, follow
from tests.support.made_up_results import lungs_at
from tests.support.running import lungreg

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((40, 36, 32), (2.0, 2.0, 3.0), (-40.0, -30.0, 100.0))
SHIFTS = {0: (0, 0, 0), 20: (1, -2, 3), 50: (-2, 1, 4), 80: (0, 3, -1)}
"""Of everything, in voxels, from phase 0."""
CUBE = (slice(12, 18), slice(14, 20), slice(15, 22))


def shifted(values: np.ndarray, shift: tuple[int, int, int]) -> np.ndarray:
    """x, y, z; nothing reaches the border."""
    return np.roll(values, shift[::-1], axis=(0, 1, 2))


def scan() -> np.ndarray:
    """Smooth, so that half a voxel matters little; the borders are equal."""
    z, y, x = np.indices(GRID.shape)
    near = np.exp(-(((x - 20) / 5.0) ** 2) - ((y - 17) / 5.0) ** 2 - ((z - 15) / 4.0) ** 2)
    return np.rint(-900 + 700 * near).astype(np.int16)


@pytest.fixture
def phases(tmp_path: Path) -> dict[int, Path]:
    folder = tmp_path / "phases"
    folder.mkdir()
    for number, shift in SHIFTS.items():
        values = torch.from_numpy(shifted(scan(), shift))[None, None]
        write_image(folder / f"case1_phase_{number:02d}.mha", values, GRID)
    (folder / "notes.txt").write_text("mine")
    return find_phases(folder)


@pytest.fixture
def structures(tmp_path: Path) -> Path:
    """Two labels: a block, and one of its corners."""
    labels = np.zeros(GRID.shape, np.uint8)
    labels[CUBE] = 3
    labels[12:14, 14:16, 15:17] = 7
    write_image(tmp_path / "gtv.mha", torch.from_numpy(labels)[None, None], GRID)
    return tmp_path / "gtv.mha"


def exact(fixed: Path, moving: Path) -> Registration:
    """The map between two phases, half in the field and half in the affine part."""
    there, here = (SHIFTS[int(path.stem[-2:])] for path in (moving, fixed))
    mm = (np.array(there) - np.array(here)) * GRID.spacing
    box = Grid((24, 24, 24), (4.0, 4.0, 5.0), (-46.0, -40.0, 90.0))
    half = torch.from_numpy(np.broadcast_to(mm[:, None, None, None] / 2, (3, *box.shape)).astype(np.float32).copy())
    transform = Transform(half[None], box, Affine.from_arrays(np.eye(3), mm / 2))
    figures = {"grids": {"fixed": asdict(GRID), "moving": asdict(GRID)}}
    whole = framed(transform)
    lungs = lungs_at(np.array([-35.0, -25.0, 105.0]), 24)
    return Registration(Result(whole, figures), inverse(whole, lungs))


@pytest.mark.parametrize("reference", [0, 50])
def test_a_known_motion(tmp_path: Path, phases: dict[int, Path], structures: Path, reference: int) -> None:
    """The ITV is the union of the shifted blocks, voxel by voxel; amplitudes are those of the shifts."""
    motions, said = follow(phases, reference, structures, tmp_path / "out", exact)
    assert "4 phases, phase" in said
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(structures)))
    relative = {number: tuple(np.array(of) - SHIFTS[reference]) for number, of in SHIFTS.items()}
    union = {label: np.zeros(GRID.shape, bool) for label in (3, 7)}
    for number, shift in relative.items():
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"structures_{number:02d}.mha")))
        assert (found == shifted(labels, shift)).all(), number
        for label in union:
            union[label] |= shifted(labels == label, shift)
    itv = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "itv.mha")))
    assert (itv == np.where(union[3], 3, np.where(union[7], 7, 0))).all()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "motion.csv").read_text())))
    mm = np.array([*SHIFTS.values()]) * GRID.spacing
    largest = max(np.linalg.norm(a - b) for a in mm for b in mm)
    for motion, row in zip(motions, rows, strict=True):
        assert motion.amplitude_mm == pytest.approx(np.ptp(mm, axis=0), abs=1e-3)
        assert [float(row[f"{axis}_mm"]) for axis in ("lr", "ap", "si")] == pytest.approx(np.ptp(mm, axis=0), abs=1e-3)
        assert float(row["largest_mm"]) == pytest.approx(largest, abs=1e-3)
        assert float(row["itv_ml"]) == pytest.approx(union[motion.label].sum() * 0.012, abs=1e-3)
        assert float(row["z_50_mm"]) == pytest.approx(relative[50][2] * GRID.spacing[2], abs=1e-3)


def test_the_mid_position_image_shows_tissue_where_it_is_on_average(tmp_path: Path, phases: dict[int, Path]) -> None:
    """Its brightest place lies at the mean of the shifts, and it is as bright as each phase: nothing is blurred."""
    follow(phases, 0, None, tmp_path / "out", exact)
    image = sitk.ReadImage(str(tmp_path / "out" / "mid_position.mha"))
    values = np.where(sitk.GetArrayFromImage(image) > -860, sitk.GetArrayFromImage(image) + 900.0, 0.0)
    index = np.stack(np.indices(GRID.shape)[::-1], axis=-1).reshape(-1, 3)
    centre = (index * values.reshape(-1, 1)).sum(axis=0) / values.sum()
    weights = np.where(scan() > -860, scan() + 900.0, 0.0)
    start = (index * weights.reshape(-1, 1)).sum(axis=0) / weights.sum()
    assert centre - start == pytest.approx(np.mean([*SHIFTS.values()], axis=0), abs=0.05)
    assert values.max() > 0.93 * weights.max()
    plain = np.mean([shifted(scan(), shift) for shift in SHIFTS.values()], axis=0) + 900
    assert plain.max() < 0.85 * weights.max()  # without the registration it would be


def test_what_is_wrong_is_said_before_anything_is_registered(
    tmp_path: Path, phases: dict[int, Path], structures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def never(fixed: Path, moving: Path) -> Registration:
        raise AssertionError("registered")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    empty = tmp_path / "empty.mha"
    write_image(empty, torch.zeros(1, 1, *GRID.shape, dtype=torch.uint8), GRID)
    for reference, labels, out, says in (
        (30, structures, "out", "--reference is 30, expected one of the phases 0, 20, 50, 80"),
        (50, empty, "out", "has no voxel above 0"),
        (50, phases[0], "out", "is no label map"),
        (50, structures, "full", "is there already"),
    ):
        with pytest.raises(InputError, match=says):
            follow(phases, reference, labels, tmp_path / out, never)
    assert not (tmp_path / "out").exists()
    assert lungreg("4d", tmp_path / "full", tmp_path / "out", "--reference=0") == 2
    assert "has 0 phases, expected two or more" in capfd.readouterr().err


def test_phases_go_by_the_last_number_of_their_names(tmp_path: Path, phases: dict[int, Path]) -> None:
    assert [*phases] == [0, 20, 50, 80]
    for name, says in (("again_50.mha", "expected each phase once"), ("mean.mha", "has no number in its name")):
        (phases[0].parent / name).touch()
        with pytest.raises(InputError, match=says):
            find_phases(phases[0].parent)
        (phases[0].parent / name).unlink()
    with pytest.raises(InputError, match="is no folder"):
        find_phases(phases[0])
