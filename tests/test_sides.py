"""Left and right lungs, also where they touch; and the command that writes them."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.geometry import Grid, canonical_axes, restored
from algorithm.lungs import LungMask
from algorithm.lungs.sides import LEFT, RIGHT, UNKNOWN, is_one_lung, left_and_right
from tests.support.made_up_results import FIXED, FIXED_LUNGS, write_result
from tests.support.running import lungreg

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((60, 40, 50), (3.0, 3.0, 3.0), (-90.0, -60.0, 0.0))


def two_lungs(bridge: bool, grid: Grid = GRID) -> LungMask:
    """Ellipsoids of 40 and 30 mm half-width at x = -48 and 45 mm; a bridge of 9 mm between them."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)[..., ::-1]
    x, y, z = np.moveaxis(grid.to_world(index), -1, 0)
    mask = (((x + 48) / 40) ** 2 + (y / 50) ** 2 + ((z - 75) / 70) ** 2 < 1) | (
        ((x - 45) / 30) ** 2 + (y / 50) ** 2 + ((z - 75) / 70) ** 2 < 1
    )
    if bridge:
        mask |= (np.abs(x) < 30) & (np.abs(y) < 5) & (np.abs(z - 75) < 5)
    return LungMask(torch.from_numpy(mask)[None, None], grid)


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_right_lung_is_the_one_at_smaller_x(bridge: bool, flipped: bool) -> None:
    grid = restored(GRID, (0, 1, 2), (True, True, False)) if flipped else GRID
    assert canonical_axes(grid)[1][0] == flipped
    lungs = two_lungs(bridge, grid)
    labels = left_and_right(lungs)[0, 0].numpy()
    index = np.argwhere(lungs.mask[0, 0].numpy())
    x = grid.to_world(index[:, ::-1])[:, 0]
    found = labels[tuple(index.T)]
    assert set(found[x < -12]) == {RIGHT} and set(found[x > 18]) == {LEFT}
    assert ((labels > 0) == lungs.mask[0, 0].numpy()).all()


@pytest.mark.parametrize("bridge", [False, True])
def test_lungs_are_counted(bridge: bool) -> None:
    lungs = two_lungs(bridge)
    assert not is_one_lung(lungs)
    lungs.mask[..., 30:] = False
    assert is_one_lung(lungs)


def test_a_thin_gap_between_lobes_makes_no_second_lung() -> None:
    lungs = two_lungs(False, GRID.resized((180, 120, 150)))
    lungs.mask[..., 90:] = False
    lungs.mask[:, :, 75] = False  # 1 mm
    assert is_one_lung(lungs)


def test_a_single_lung_is_not_cut_in_two() -> None:
    lungs = two_lungs(False)
    lungs.mask[..., 30:] = False
    assert set(left_and_right(lungs).unique().tolist()) == {0, UNKNOWN}


def test_the_command_writes_them_on_the_grid_of_the_scan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result, out = write_result(tmp_path / "result"), tmp_path / "lungs.nii.gz"
    assert lungreg("lungs", result, out, "--of", "fixed") == 0
    assert (
        "the lungs of the fixed scan (now.mha): 3: lungs, which could not be taken apart, 0.42 l"
        in capfd.readouterr().out
    )
    found = sitk.ReadImage(str(out))
    assert (found.GetSize(), found.GetPixelID()) == (FIXED.size, sitk.sitkUInt8)
    volume = np.prod(found.GetSpacing()) * np.count_nonzero(sitk.GetArrayFromImage(found))
    assert volume * 1e-6 == pytest.approx(FIXED_LUNGS.litres, rel=0.1)
    assert lungreg("lungs", result, out, "--of", "fixed") == 2
    assert "is there already" in capfd.readouterr().err
    assert lungreg("lungs", result, tmp_path / "lungs.txt", "--of", "fixed") == 2
    assert "is no name for an image" in capfd.readouterr().err
