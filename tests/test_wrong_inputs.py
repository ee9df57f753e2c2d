"""The wrong inputs of `benchmarks.wrong_inputs` are wrong in the way that their names say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from algorithm.cascade.weights import load_cascade
from algorithm.errors import InputError
from algorithm.files.images import Image, canonical, read_image
from algorithm.geometry import Affine, Grid
from algorithm.lungs import LungMask, lung_mask
from benchmarks.trust import Trial, results
from benchmarks.wrong_inputs import ASIDE_MM, folded, mirrored, without_lungs, wrong_inputs, wrong_masks

pytestmark = pytest.mark.usefixtures("one_thread")

TURNED = Affine.from_arrays(np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), np.zeros(3)).matrix
GRID = Grid((40, 30, 50), (3.0, 4.0, 2.0), (-60.0, 10.0, 300.0), TURNED)


def points(seed: int = 0) -> np.ndarray:
    """Some voxels of the grid, (n, 3) as indices."""
    return np.random.default_rng(seed).integers(0, np.array(GRID.size), (50, 3))


def read(image: Image, index: np.ndarray) -> np.ndarray:
    """Values at voxels."""
    x, y, z = np.rint(index).astype(int).T
    found: np.ndarray = image.voxels[0, 0].numpy()[z, y, x]
    return found


@pytest.mark.parametrize("axis", [0, 2])
def test_mirrored_is_the_scan_at_the_reflected_place(axis: int) -> None:
    image = Image(torch.rand(1, 1, *GRID.shape), GRID, Path("a"))
    other, world = mirrored(image, axis)
    there = world(GRID.to_world(points()))
    np.testing.assert_array_equal(read(other, points()), read(image, GRID.to_index(there)))
    np.testing.assert_allclose(world(there), GRID.to_world(points()), atol=1e-9)
    assert np.linalg.det(np.array(world.matrix)) == pytest.approx(-1)


def test_folded_is_the_scan_where_a_field_that_folds_leads() -> None:
    grid = Grid((30, 30, 60), (3.0, 3.0, 2.0), (0.0, 0.0, -60.0))
    z = torch.from_numpy(grid.to_world(np.stack([np.zeros(60), np.zeros(60), np.arange(60)], axis=1))[:, 2])
    image = Image(z.float()[:, None, None].expand(1, 1, *grid.shape).contiguous(), grid, Path("a"))  # its value is z
    lungs = LungMask(torch.ones(1, 1, *grid.shape, dtype=torch.bool), grid)
    other, undone = folded(image, lungs)
    index = np.array([[15, 15, k] for k in range(10, 50)])
    mapped = undone(grid.to_world(index))[:, 2]
    np.testing.assert_allclose(read(other, index), mapped, atol=1e-3)
    assert (np.diff(mapped) < 0).any() and mapped[0] < mapped[-1]


def test_masks_are_wrong() -> None:
    mask = torch.zeros(1, 1, *GRID.shape, dtype=torch.bool)
    mask[..., 10:40, 8:22, 5:15] = mask[..., 10:40, 8:22, 25:35] = True
    fixed = LungMask(mask, GRID)
    moving = LungMask(mask.roll(2, dims=2), GRID)
    made = wrong_masks(fixed, moving)
    assert made["of everything"][0].mask.all()
    assert torch.equal(made["inverted"][1].mask, ~moving.mask)
    assert made["of one lung"][0].litres == pytest.approx(fixed.litres / 2)
    assert made["aside"][1].grid.origin[0] - GRID.origin[0] == ASIDE_MM
    assert made["of the other scan"] == (moving, fixed)


def test_without_lungs_there_are_none(example: Path) -> None:
    scan = canonical(read_image(example / "fixed.mha"))
    empty = without_lungs(scan, lung_mask(scan.voxels, scan.grid))
    with pytest.raises(InputError, match="no lung"):
        lung_mask(empty.voxels, empty.grid)


def test_a_refusal_is_a_row_of_the_table(example: Path, small_weights: Path, tmp_path: Path) -> None:
    scans = (read_image(example / f"{role}.mha") for role in ("fixed", "moving"))
    by_name = {wrong.name: wrong for wrong in wrong_inputs(*scans, tmp_path)}
    wrong = by_name["moving mask inverted"]
    (row,) = results(Trial("a", wrong.fixed, wrong.moving, None, masks=wrong.masks), load_cascade(small_weights), [])
    assert "as if it were inverted" in str(row["refused"])
    assert by_name["exchanged"].swapped and torch.equal(by_name["exchanged"].fixed.voxels, wrong.moving.voxels)
