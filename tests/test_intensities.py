"""HU are left alone, stored values are put right, and everything else is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.errors import InputError
from algorithm.files.images import Image, read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Grid
from algorithm.preparation.intensities import in_hounsfield_units
from algorithm.preparation.subject import find_lungs
from phantom.pair import PhantomPair
from tests.support.running import call_main, pair_options, results, warped_image
from tests.support.strategies import examples

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
REAL = sorted(
    p for folder in ("pairs", "single", "popi_phases", "full_resolution") for p in DATA.glob(f"{folder}/**/*.mha")
)
REAL = [path for path in REAL if "mask" not in path.name]


@pytest.fixture(scope="module")
def scan(example_pair: PhantomPair) -> Image:
    """A phantom in HU, int16."""
    return Image(example_pair.fixed.round().short(), example_pair.fixed_grid, Path("scan.mha"))


def changed(image: Image, change: Callable[[Tensor], Tensor]) -> Image:
    return replace(image, voxels=change(image.voxels))


def corners(voxels: Tensor, value: float) -> Tensor:
    """Padding outside the scanner's circular field of view."""
    y, x = (torch.linspace(-1, 1, n) for n in voxels.shape[3:])
    return voxels.masked_fill(y[:, None] ** 2 + x**2 > 1, value)


# --- HU stay as they are ---------------------------------------------------------------------------------------------


def cut(voxels: Tensor) -> Tensor:
    """A small field of view inside the body: no outside air."""
    return voxels[:, :, 10:26, 7:23, 6:30]


def contrast(voxels: Tensor) -> Tensor:
    """Half of the soft tissue enhanced to 300–500 HU."""
    enhanced = (voxels > 0) & (torch.arange(voxels.shape[4]) % 2 == 0)
    return torch.where(enhanced, voxels // 4 + 350, voxels)


def metal(value: int) -> Callable[[Tensor], Tensor]:
    def add(voxels: Tensor) -> Tensor:
        voxels = voxels.clone()
        voxels[:, :, 15:20, 20:23, 15:20] = value
        return voxels

    return add


VALID: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda v: v,
    "float": lambda v: v.float() + 0.25,
    "clipped": lambda v: v.clamp(-1000, 200),
    "clipped at -1024": lambda v: v.clamp(-1024, 3071),
    "in steps of 32": lambda v: v // 32 * 32,
    "padding -1000": lambda v: corners(v, -1000),
    "padding -2048": lambda v: corners(v, -2048),
    "padding -3024": lambda v: corners(v, -3024),
    "padding -32768": lambda v: corners(v, -32768),
    "padding 0": lambda v: corners(v, 0),
    "small field of view": cut,
    "contrast": contrast,
    "saturated metal": metal(3071),
    "metal beyond": metal(30000),
    "exhaled": lambda v: torch.where(v < -500, v // 5 - 400, v),
    "consolidated": lambda v: torch.where((v < -500) & (v > -960), v // 4, v),
    "tissue outside the lungs removed": lambda v: torch.where(v < -500, v, 0),
}


@pytest.mark.parametrize("kind", VALID)
def test_hounsfield_units_stay(scan: Image, kind: str) -> None:
    image = changed(scan, VALID[kind])
    assert in_hounsfield_units(image) is image


@examples(15)
@given(st.integers(-24, 24), st.floats(0.9, 1.1), st.floats(-950.0, -500.0), st.sampled_from([-1024, -1000, -3024]))
def test_chests_of_any_density_stay(scan: Image, shift: int, scale: float, lung_hu: float, least: int) -> None:
    """A scanner that is badly calibrated, any depth of breath."""

    def breathe(voxels: Tensor) -> Tensor:
        hu = voxels.float() * scale + shift
        lungs = (hu < -500) & (hu > -950)
        return torch.where(lungs, hu - hu[lungs].mean() + lung_hu, hu).clamp(min=least).round().short()

    image = changed(scan, breathe)
    assert in_hounsfield_units(image) is image


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="no real scans")
def test_real_scans_stay_and_are_known_with_an_offset() -> None:
    for path in REAL:
        image = read_image(path)
        assert in_hounsfield_units(image) is image, path
        stored = in_hounsfield_units(changed(image, lambda v: (v[:, :, ::2, ::2, ::2] + 1024).clamp(min=0)))
        assert len(stored.remarks) == 1, path
        tissue = image.voxels[:, :, ::2, ::2, ::2].clamp(min=-900)
        assert (stored.voxels.clamp(min=-900) - tissue).abs().max() <= 24, path


# --- stored values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1024, 1000])
@pytest.mark.parametrize("kind", ["int16", "float", "clipped", "small field of view", "padding -2000", "padding -1000"])
def test_offset_is_subtracted(scan: Image, offset: int, kind: str) -> None:
    """Whether it is 1000 or 1024 cannot be told without outside air, nor when that is clipped."""
    known = kind in ("int16", "float") or offset == 1024
    image = changed(scan, cut) if kind == "small field of view" else scan
    image = changed(image, lambda v: v.clamp(-1000, 200) if kind == "clipped" else v)
    stored = changed(image, lambda v: v.float() + offset if kind == "float" else v + offset)
    if kind.startswith("padding"):
        stored = changed(stored, lambda v: corners(v, float(kind.removeprefix("padding "))))
        image = changed(image, lambda v: corners(v, -3000))
    before = stored.voxels.clone()
    found = in_hounsfield_units(stored)
    assert found.voxels.dtype == stored.voxels.dtype
    assert torch.equal(stored.voxels, before)  # the caller's are not touched
    assert (found.voxels - image.voxels.clamp(min=-1024)).abs().max() <= (0 if known else 24)
    (remark,) = found.remarks
    assert "scan.mha" in remark and "was subtracted" in remark


def test_offset_does_not_overflow(scan: Image) -> None:
    stored = changed(scan, lambda v: corners(v + 1024, -32768))
    assert in_hounsfield_units(stored).voxels.min() == -1024


@pytest.mark.parametrize(("value", "offset"), [(4095, 0), (4095, 1024), (32767, 0)])
def test_high_padding_becomes_air(scan: Image, value: int, offset: int) -> None:
    found = in_hounsfield_units(changed(scan, lambda v: corners(v + offset, value)))
    expected = corners(scan.voxels, -1000 if offset == 0 else -1024).clamp(min=-1024)
    assert (found.voxels - expected if offset else found.voxels - corners(scan.voxels, -1000)).abs().max() == 0
    assert f"padding of {value}" in found.remarks[0]


# --- refused ---------------------------------------------------------------------------------------------------------


def window(low: int, high: int, top: float) -> Callable[[Tensor], Tensor]:
    return lambda v: (v.float().clamp(low, high) - low) / (high - low) * top


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "0..1": window(-1024, 3071, 1.0),
    "-1..1": lambda v: window(-1000, 400, 2.0)(v) - 1,
    "0..255": lambda v: window(-1350, 150, 255.0)(v).round().short(),
    "0..1000": window(-1000, 200, 1000.0),
    "0..65535": lambda v: window(-1024, 1000, 65535.0)(v).clamp(max=32767).short(),
    "soft tissue window": lambda v: v.clamp(-160, 240),
    "standardised": lambda v: (v.float() - v.float().mean()) / v.float().std(),
    "inverted": lambda v: -v,
    "inverted and clipped": lambda v: -v.clamp(-1000, 200),
    "density in g/ml": lambda v: v.float() / 1000 + 1,
    "0..1 with padding -1000": lambda v: corners(window(-1024, 3071, 1.0)(v), -1000),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_hounsfield_units_is_refused(scan: Image, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        in_hounsfield_units(changed(scan, REFUSED[kind]))
    message = str(caught.value)
    assert message.startswith("scan.mha: has values from") and "expected Hounsfield units" in message
    assert "\n" not in message
    assert ("sign" in message) == kind.startswith("inverted")


def test_message_says_what_was_found() -> None:
    voxels = torch.linspace(0, 255, 16**3).reshape(1, 1, 16, 16, 16)
    with pytest.raises(InputError, match=r"from 2\.55 to 252\.\d .* median 127\.5"):
        in_hounsfield_units(Image(voxels, Grid((16, 16, 16)), Path("a.mha")))


# --- as part of the preparation --------------------------------------------------------------------------------------


def test_subject_is_in_hounsfield_units(scan: Image) -> None:
    plain, stored = find_lungs(scan, None), find_lungs(changed(scan, lambda v: (v + 1024).clamp(min=0)), None)
    assert plain.image.remarks == () and len(stored.image.remarks) == 1
    assert torch.equal(stored.image.voxels, plain.image.voxels.clamp(min=-1024))
    assert np.isclose(stored.lungs.litres, plain.lungs.litres, rtol=0.01)


def test_warped_image_is_in_hounsfield_units_and_the_user_is_told(
    tmp_path: Path, scan: Image, example_pair: PhantomPair, example: Path, small_weights: Path
) -> None:
    fixed = scan.voxels.float()
    fixed[0, 0, 0, 0, :5] = torch.nan
    write_image(tmp_path / "fixed.mha", fixed, scan.grid)
    write_image(tmp_path / "moving.mha", example_pair.moving.round().short() + 1024, example_pair.moving_grid)
    options = pair_options(example, tmp_path / "out", small_weights)
    assert call_main(*options, f"--fixed={tmp_path / 'fixed.mha'}", f"--moving={tmp_path / 'moving.mha'}") == 0
    warnings = [text for text in results(tmp_path / "out")["warnings"] if "mha" in text]
    assert len(warnings) == 2 and "5 of" in warnings[0] and "1024 was subtracted" in warnings[1]
    warped = sitk.GetArrayFromImage(warped_image(tmp_path / "out"))
    assert -1024 <= warped.min() < -990 and -100 < np.median(warped[warped > -400]) < 100
