"""Which lung masks are taken for a scan's, and which are refused or doubted; lungs of an infant through it all."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithm.__main__ import main
from algorithm.errors import InputError
from algorithm.files.images import Image, read_field, read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Grid, displacement_at
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import Subject, find_both_lungs, find_lungs, given_lungs
from phantom.__main__ import write_pair
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair
from tests.support.running import pair_options, results


@pytest.fixture
def scan(example_pair: PhantomPair) -> Image:
    return Image(example_pair.fixed.round().short(), example_pair.fixed_grid, Path("fixed.mha"))


@pytest.fixture
def lungs(example_pair: PhantomPair) -> Tensor:
    return example_pair.fixed_lobes > 0


def scaled(grid: Grid, factor: float) -> Grid:
    x, y, z = (factor * s for s in grid.spacing)
    ox, oy, oz = (factor * o for o in grid.origin)
    return replace(grid, spacing=(x, y, z), origin=(ox, oy, oz))


def write_floats(path: Path, values: np.ndarray, grid: Grid) -> Path:
    write_image(path, torch.from_numpy(values.astype(np.float32)), grid)
    return path


def with_mask(path: Path, scan: Image, mask: Tensor, grid: Grid | None = None) -> Subject:
    write_image(path, mask.to(torch.uint8), grid or scan.grid)
    return find_lungs(scan, path)


# --- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outside", "inside"), [(0.001, 0.999), (0.0, 1.0), (0.45, 0.55), (-1.0, 20.0)])
def test_shares_above_one_half_count(tmp_path: Path, scan: Image, lungs: Tensor, outside: float, inside: float) -> None:
    shares = write_floats(tmp_path / "a.mha", np.where(lungs.numpy(), inside, outside), scan.grid)
    found = given_lungs(shares, scan)
    assert found is not None and torch.equal(found.mask, lungs)


def test_all_labels_count(tmp_path: Path, scan: Image, example_pair: PhantomPair) -> None:
    for shift in (0, 9):  # 10 to 14: as TotalSegmentator's lobes
        lobes = example_pair.fixed_lobes
        write_image(tmp_path / "a.mha", torch.where(lobes > 0, lobes + shift, 0).to(torch.uint8), scan.grid)
        found = given_lungs(tmp_path / "a.mha", scan)
        assert found is not None and torch.equal(found.mask, lobes > 0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.36])
@pytest.mark.parametrize("kind", ["everything", "inverted", "10 and 20"])
def test_masks_all_over_their_border_are_refused(
    tmp_path: Path, scan: Image, lungs: Tensor, kind: str, factor: float
) -> None:
    """An infant's as well, whose whole chest has no more litres than an adult's lungs."""
    mask = {"everything": torch.ones_like(lungs), "inverted": ~lungs, "10 and 20": 10 + 10 * lungs}[kind]
    small = replace(scan, grid=scaled(scan.grid, factor))
    with pytest.raises(InputError, match=r"a\.mha: the mask covers (9\d|100)% of its own border.* expected 0 outside"):
        with_mask(tmp_path / "a.mha", small, mask)


@pytest.mark.parametrize(("factor", "litres"), [(0.17, r"0\.016"), (1.6, "13")])
def test_masks_of_no_lungs_volume_are_refused(
    tmp_path: Path, scan: Image, lungs: Tensor, factor: float, litres: str
) -> None:
    small = replace(scan, grid=scaled(scan.grid, factor))
    with pytest.raises(InputError, match=rf"the mask has {litres} l, expected lungs of 0\.02 to 12 l"):
        with_mask(tmp_path / "a.mha", small, lungs)


# --- what is doubted -------------------------------------------------------------------------------------------------


def test_a_mask_of_tissue_is_doubted(tmp_path: Path, scan: Image, lungs: Tensor) -> None:
    dilated = sitk.GetArrayFromImage(sitk.BinaryDilate(sitk.GetImageFromArray(lungs[0, 0].byte().numpy()), [2] * 3))
    doubted = with_mask(tmp_path / "a.mha", scan, torch.from_numpy(dilated)[None, None] - lungs.byte())
    assert [r for r in doubted.image.remarks if "a.mha: the median under the mask is" in r and "fixed.mha" in r]


@pytest.mark.parametrize(("aside_mm", "doubts"), [(0.0, 0), (4.0, 0), (16.0, 1), (30.0, 1)])
def test_a_mask_that_does_not_end_where_the_lungs_do_is_doubted(
    tmp_path: Path, scan: Image, lungs: Tensor, aside_mm: float, doubts: int
) -> None:
    """Such as that of another scan; half a voxel of this phantom is nothing."""
    x, y, z = scan.grid.origin
    grid = replace(scan.grid, origin=(x + aside_mm, y, z))
    write_image(tmp_path / "a.mha", lungs.byte(), grid)
    remarks = find_lungs(scan, tmp_path / "a.mha").image.remarks
    assert len([r for r in remarks if "of the mask's border lies where the lungs end in" in r]) == doubts


@pytest.mark.parametrize(
    ("fixed", "moving", "single"),
    [
        ("one", None, "fixed"),
        (None, "one", "moving"),
        ("one", "one", None),
        ("both", None, None),
        (None, None, None),
    ],
)
def test_a_mask_of_one_lung_of_two_is_doubted(
    tmp_path: Path, scan: Image, lungs: Tensor, fixed: str | None, moving: str | None, single: str | None
) -> None:
    half = lungs.clone()
    half[..., : lungs.shape[-1] // 2] = False
    for name, mask in (("one", half), ("both", lungs)):
        write_image(tmp_path / f"{name}.mha", mask.byte(), scan.grid)
    paths = (name and tmp_path / f"{name}.mha" for name in (fixed, moving))
    masks = dict(zip(("fixed_mask", "moving_mask"), paths, strict=True))
    found = find_both_lungs(fixed=scan, moving=scan, **masks)
    remarks = [r for subject in found for r in subject.image.remarks if "One lung in the" in r]
    assert len(remarks) == (single is not None)
    assert all(f"One lung in the {single} scan, two in the" in r for r in remarks)


@pytest.mark.parametrize("hu", [-700, -400, 0])
def test_other_lungs_are_not_doubted_unless_half_of_them_hold_no_air(
    tmp_path: Path, scan: Image, lungs: Tensor, hu: int
) -> None:
    """ARDS, fibrosis: the lower part of both lungs, by 40 %, and most of them."""
    depth = lungs.nonzero()[:, 2].float()
    for share, doubts in ((0.4, 0), (0.95, int(hu == 0))):
        dense = lungs & (torch.arange(scan.grid.size[2])[:, None, None] < depth.quantile(share))
        changed = replace(scan, voxels=scan.voxels.masked_fill(dense, hu))
        assert len(with_mask(tmp_path / "a.mha", changed, lungs).image.remarks) == doubts


@pytest.mark.parametrize("which", ["emphysema", "one lung", "in the box around the lungs", "larger than the scan"])
def test_lungs_are_neither_refused_nor_doubted(
    tmp_path: Path, scan: Image, lungs: Tensor, example_pair: PhantomPair, which: str
) -> None:
    grid = scan.grid
    if which == "emphysema":
        scan = replace(scan, voxels=torch.where(lungs & (scan.voxels < -700), -970, scan.voxels))
    elif which == "one lung":
        lungs = example_pair.fixed_lobes > 2
    elif which == "in the box around the lungs":
        (z, y, x), (nz, ny, nx) = (lungs[0, 0].nonzero().amin(0).tolist(), lungs[0, 0].nonzero().amax(0).tolist())
        lungs = lungs[..., z : nz + 1, y : ny + 1, x : nx + 1]
        grid = grid.cropped((x, y, z), (nx + 1 - x, ny + 1 - y, nz + 1 - z))
    else:
        lungs, grid = F.pad(lungs, [6] * 6), grid.padded(6)
        scan = replace(scan, voxels=scan.voxels[:, :, 10:], grid=grid.cropped((6, 6, 16), (36, 30, 24)))
    assert with_mask(tmp_path / "a.mha", scan, lungs, grid).image.remarks == ()


# --- an infant -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PhantomPair]:
    """The files of a pair whose lungs have 0.15 l: all lengths of an adult's times 0.36, voxels of 1.4 mm."""
    pair = make_pair(PhantomSettings(fixed_grid=chest_grid((76, 60, 70))))
    small = replace(
        pair,
        fixed_grid=scaled(pair.fixed_grid, 0.36),
        moving_grid=scaled(pair.moving_grid, 0.36),
        displacement_mm=0.36 * pair.displacement_mm,
        fixed_landmarks_mm=0.36 * pair.fixed_landmarks_mm,
        moving_landmarks_mm=0.36 * pair.moving_landmarks_mm,
    )
    folder = tmp_path_factory.mktemp("infant")
    write_pair(folder, small)
    return folder, small


@pytest.mark.usefixtures("one_thread")
def test_an_infant_is_registered_with_masks(
    infant: tuple[Path, PhantomPair], small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it, with an untrained cascade."""
    folder, pair = infant
    masks = [f"--{role}-mask={folder / f'{role}_lobes.mha'}" for role in ("fixed", "moving")]
    monkeypatch.setattr(sys, "argv", ["algorithm", *pair_options(folder, folder / "out", small_weights), *masks])
    assert main() == 0
    assert results(folder / "out")["warnings"] == []
    fixed, moving = pair.fixed_landmarks_mm, pair.moving_landmarks_mm
    displacement, grid = read_field(folder / "out" / "images" / "displacement-field" / "fixed.mha")
    found = fixed + displacement_at(torch.from_numpy(fixed), displacement.double(), grid).numpy()
    before, after = (np.linalg.norm(moved - moving, axis=1).mean() for moved in (fixed, found))
    assert after < 0.21 < 3 < before  # 0.25 with levels as coarse as an adult's


def test_without_masks_the_sentence_speaks_of_size(infant: tuple[Path, PhantomPair]) -> None:
    folder, _ = infant
    with pytest.raises(InputError) as caught:
        find_lungs(read_image(folder / "fixed.mha"), None)
    assert "is too small, 0.1" in str(caught.value) and "give lung masks" in str(caught.value)
    assert "Hounsfield" not in str(caught.value)


# --- where a scan ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["fixed", "moving"])
def test_the_prealignment_compares_nothing_beyond_the_end_of_a_scan(example_pair: PhantomPair, cut: str) -> None:
    """Lungs that the field of view ends in go on there: the map must not shrink the other scan's into what is seen."""
    ends: dict[str, float] = {}

    def scan(name: str, voxels: Tensor, grid: Grid) -> Subject:
        if name == cut:
            nx, ny, nz = grid.size
            voxels, grid = voxels[:, :, nz // 2 :], grid.cropped((0, 0, nz // 2), (nx, ny, nz - nz // 2))
        ends[name] = grid.origin[2]
        return find_lungs(Image(voxels.round().short(), grid, Path(f"{name}.mha")), None)

    fixed = scan("fixed", example_pair.fixed, example_pair.fixed_grid)
    moving = scan("moving", example_pair.moving, example_pair.moving_grid)
    found = prepare(fixed, moving, (32, 32, 32)).affine
    points, targets = example_pair.fixed_landmarks_mm, example_pair.moving_landmarks_mm
    seen = (points[:, 2] > ends["fixed"]) & (targets[:, 2] > ends["moving"])
    best = Affine.least_squares(points[seen], targets[seen])
    error, least = (np.linalg.norm(a(points[seen]) - targets[seen], axis=1).mean() for a in (found, best))
    assert error < 1.8 * least
