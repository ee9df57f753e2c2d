"""The figures that say whether to trust a result, against numpy; and the warnings that follow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algorithm.fields.quality import quality, warnings
from algorithm.geometry import Affine, Grid
from algorithm.preparation.prepare import Prepared
from tests.support.strategies import smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((24, 20, 22), (2.0, 2.5, 3.0), (-30.0, -20.0, 100.0))


def ball(shift: int = 0) -> Tensor:
    """Lungs, 1 inside."""
    z, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in GRID.shape), indexing="ij")
    return (((x - 11.5 - shift) ** 2 + (y - 9.5) ** 2 + (z - 10.5) ** 2) < 49).float()[None, None]


def pair(shift: int = 2) -> Prepared:
    """The moving image is the fixed one, ``shift`` voxels farther along x."""
    noise = torch.randn(1, 1, *GRID.shape, generator=torch.Generator().manual_seed(0))
    image = -700 + 100 * torch.nn.functional.avg_pool3d(noise, 5, 1, 2) * 11
    moved = image.roll(shift, dims=-1)
    return Prepared(image, ball(), GRID, moved, ball(shift), GRID, Affine())


def constant(x_mm: float) -> Tensor:
    u = torch.zeros(1, 3, *GRID.shape)
    u[:, 0] = x_mm
    return u


def test_the_right_field_makes_everything_fit() -> None:
    figures = quality(pair(), constant(4.0), GRID, GRID, GRID)
    before, after = figures["before"], figures["after"]
    assert before["lung_dice"] < 0.8 and after["lung_dice"] == pytest.approx(1.0)
    assert after["mask_distance"] < 1e-6 < before["mask_distance"]
    for name in ("ngf_distance", "local_correlation_distance"):
        assert after[name] < 0.5 * before[name]
    assert after["curvature"] == pytest.approx(0.0, abs=1e-9) and after["volume_change"] == pytest.approx(0.0, abs=1e-9)


def test_lung_dice_is_that_of_the_masks() -> None:
    prepared = pair()
    before = quality(prepared, constant(0.0), GRID, GRID, GRID)["before"]
    a, b = (torch.nn.functional.avg_pool3d(m, 2) > 0.5 for m in (prepared.fixed_lungs, prepared.moving_lungs))
    assert before["lung_dice"] == pytest.approx(float(2 * (a & b).sum() / (a.sum() + b.sum())), abs=0.05)


def test_share_outside_the_field_of_view() -> None:
    """Half of the lungs is above the last slice of the moving image."""
    half = GRID.cropped((0, 0, 0), (24, 20, 11))
    figures = quality(pair(0), constant(0.0), GRID, GRID, half)
    assert figures["after"]["outside_field_of_view"] == pytest.approx(0.5, abs=0.1)
    assert quality(pair(0), constant(0.0), GRID, GRID, GRID)["after"]["outside_field_of_view"] == 0


@pytest.mark.parametrize("cut", ["fixed", "moving"])
def test_what_one_scan_does_not_show_is_no_misfit(cut: str) -> None:
    """The upper half is missing: air in the image, nothing in the mask."""
    whole, half = pair(), GRID.cropped((0, 0, 0), (24, 20, 11))
    names = {"fixed": ("fixed", "fixed_lungs"), "moving": ("moving", "moving_lungs")}[cut]
    changes = {name: getattr(whole, name).clone() for name in names}
    for name, fill in zip(names, (-1000.0, 0.0), strict=True):
        changes[name][:, :, 11:] = fill
    views = (half, GRID) if cut == "fixed" else (GRID, half)
    after = quality(replace(whole, **changes), constant(4.0), GRID, *views)["after"]
    right = quality(whole, constant(4.0), GRID, GRID, GRID)["after"]
    assert after["lung_dice"] == pytest.approx(1.0, abs=0.05)
    assert after["ngf_distance"] == pytest.approx(right["ngf_distance"], abs=0.03)
    assert quality(replace(whole, **changes), constant(4.0), GRID, GRID, GRID)["after"]["lung_dice"] < 0.9


def test_a_field_on_another_grid_is_resampled() -> None:
    coarse = GRID.resized((6, 5, 11))
    u = smooth_field(coarse, 2.0, torch.Generator().manual_seed(0))
    figures = quality(pair(), u, coarse, GRID, GRID)
    assert figures["after"]["curvature"] > 0 and figures["before"]["curvature"] == 0


def test_a_good_result_brings_no_warning_and_each_fault_its_own() -> None:
    good = quality(pair(), constant(4.0), GRID, GRID, GRID)
    assert warnings(good) == []
    for name, value, words in (
        ("lung_dice", 0.6, "overlap"),
        ("outside_field_of_view", 0.3, "field of view"),
        ("ngf_distance", 0.5, "alike"),
    ):
        (sentence,) = warnings({"before": good["before"], "after": good["after"] | {name: value}})
        assert words in sentence
