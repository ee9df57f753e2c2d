"""The measures of lung function as functions of numbers: answers worked out by hand, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from algorithm.errors import InputError
from algorithm.function.deformation import (
    anisotropic_deformation_index,
    principal_strains,
    principal_stretches,
    slab_rod_index,
)
from algorithm.function.density import low_attenuation_percent, mass_g, mean_lung_density_hu, percentile_hu
from algorithm.function.median import median
from algorithm.function.prm import (
    COLOURS,
    EMPHYSEMA,
    EMPTYING,
    FSAD,
    LEFT_OUT,
    NAMES,
    NORMAL,
    UNCERTAIN,
    classes,
    colour_table,
)
from algorithm.function.settings import FunctionSettings
from algorithm.function.ventilation import mass_factor, sacj, sai, saj, scaled, tissue_share
from algorithm.function.voxels import which_is_inspiration
from tests.support.strategies import examples

PROPERTY = examples(50)
SHARES = st.floats(0.02, 0.6)
TISSUE = FunctionSettings.tissue_hu
STRETCHES = st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3).map(sorted)


# --- ventilation -----------------------------------------------------------------------------------------------------


def test_air_has_no_tissue_and_tissue_has_no_air() -> None:
    assert tissue_share(np.array([-1000.0, TISSUE, -472.5]), TISSUE) == pytest.approx([0, 1, 0.5])


def test_ventilation_by_hand() -> None:
    """A cube of 1 ml, half of it tissue, takes in 1 ml of air: its air grows threefold."""
    share_ex, share_in, expansion = 0.5, 0.25, 2.0
    assert saj(expansion) == 1.0
    assert sacj(expansion, share_in, share_ex) == pytest.approx(2.0)
    assert sai(share_in, share_ex) == pytest.approx(2.0)


@PROPERTY
@given(share=SHARES, expansion=st.floats(0.7, 3.0))
def test_where_no_tissue_comes_or_goes_intensity_and_volume_say_the_same(share: float, expansion: float) -> None:
    """Ding et al. 2012: SAI follows from SACJ; SAJ is less, as tissue does not expand."""
    after = share / expansion
    assert sai(after, share) == pytest.approx(sacj(expansion, after, share), abs=1e-9)
    assert abs(saj(expansion)) <= abs(sacj(expansion, after, share)) + 1e-12


@PROPERTY
@given(inside=st.floats(-980, -600), outside=st.floats(-950, -300))
def test_with_tissue_of_0_hu_it_is_simons_formula(inside: float, outside: float) -> None:
    simon = 1000 * (inside - outside) / (outside * (inside + 1000))
    assert sai(tissue_share(inside, 0.0), tissue_share(outside, 0.0)) == pytest.approx(simon, abs=1e-9)


def test_more_blood_at_inspiration_is_taken_out() -> None:
    """10 % more mass: what is left is the ventilation without it."""
    share_ex, expansion = 0.4, 1.5
    hu_in = scaled(np.array(share_ex / expansion * (TISSUE + 1000) - 1000), 1.1)
    factor = mass_factor(1.1, 1.0)
    assert factor == pytest.approx(1 / 1.1)
    corrected = tissue_share(scaled(hu_in, factor), TISSUE)
    assert sai(corrected, share_ex) == pytest.approx(sacj(expansion, share_ex / expansion, share_ex))
    assert sai(tissue_share(hu_in, TISSUE), share_ex) < 0.85 * sai(corrected, share_ex)


def test_a_voxel_of_air_alone_does_not_stop_the_rest() -> None:
    found = sai(np.array([0.0, 0.25]), np.array([0.5, 0.5]))
    assert np.isinf(found[0]) and found[1] == pytest.approx(2.0)


# --- the median filter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("edge", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 4), (9, 8, 7)], ids=str)
def test_the_median_is_scipys(dtype: str, edge: int, shape: tuple[int, int, int]) -> None:
    """Also of equal values, and at the borders."""
    values = np.random.default_rng(0).integers(-20, 20, shape).astype(dtype)
    expected = ndimage.median_filter(values, size=edge, mode="nearest")
    found = median(values, edge)
    assert (found == expected).all() and found.dtype == values.dtype


# --- parametric response map -----------------------------------------------------------------------------------------


def test_the_four_quadrants_and_what_is_left_out() -> None:
    """On a threshold a voxel is not below it."""
    settings = FunctionSettings()
    inspiration = np.array([-950, -950, -951, -951, -900, -499, -500, -1025, -900], float)
    expiration = np.array([-856, -857, -857, -856, -499, -900, -500, -900, -700], float)
    certain = np.array([True] * 8 + [False])
    expected = [NORMAL, FSAD, EMPHYSEMA, EMPTYING, LEFT_OUT, LEFT_OUT, NORMAL, LEFT_OUT, UNCERTAIN]
    assert classes(inspiration, expiration, certain, settings).tolist() == expected


def test_the_thresholds_can_be_chosen() -> None:
    settings = FunctionSettings(
        prm_inspiration_hu=-910.0, prm_expiration_hu=-800.0, ceiling_hu=-250.0, floor_hu=-1000.0
    )
    found = classes(np.array([-920.0, -900.0, -1001.0]), np.array([-810.0, -300.0, -900.0]), np.ones(3, bool), settings)
    assert found.tolist() == [EMPHYSEMA, NORMAL, LEFT_OUT]


def test_the_colour_table_names_every_label_once() -> None:
    lines = [line.split() for line in colour_table().splitlines() if not line.startswith("#")]
    assert [int(line[0]) for line in lines] == [0, *NAMES]
    assert all(len(line) == 6 and all(0 <= int(cell) <= 255 for cell in line[2:]) for line in lines)
    assert len(set(COLOURS.values())) == len(COLOURS) and lines[0][5] == "0" and lines[1][5] == "255"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (FunctionSettings(filter_voxels=2), "--filter-voxels is 2"),
        (FunctionSettings(floor_hu=-900.0), "--floor-hu is -900"),
        (FunctionSettings(ceiling_hu=-900.0), "--ceiling-hu is -900"),
        (FunctionSettings(ceiling_hu=100.0), "--ceiling-hu is 100"),
        (FunctionSettings(most_error_mm=0.0), "--most-error-mm is 0"),
    ],
    ids=["filter", "floor", "ceiling", "above tissue", "error"],
)
def test_settings_that_make_no_sense_are_refused(settings: FunctionSettings, says: str) -> None:
    with pytest.raises(InputError, match=says):
        settings.check()


# --- deformation -----------------------------------------------------------------------------------------------------


@PROPERTY
@given(stretches=STRETCHES, seed=st.integers(0, 1000))
def test_stretches_do_not_depend_on_the_directions(stretches: list[float], seed: int) -> None:
    """F = R₁ diag(λ) R₂; the determinant is their product, and the singular values are SciPy's second opinion."""
    first, second = Rotation.random(2, random_state=seed).as_matrix()
    gradient = first @ np.diag(stretches) @ second
    found = principal_stretches(gradient[None])[0]
    assert found == pytest.approx(stretches, abs=1e-6)
    assert found == pytest.approx(np.linalg.svd(gradient, compute_uv=False)[::-1], abs=1e-6)
    green = (gradient.T @ gradient - np.eye(3)) / 2
    assert principal_strains(found[None])[0] == pytest.approx(np.linalg.eigvalsh(green), abs=1e-6)


@pytest.mark.parametrize(
    ("stretches", "adi", "sri"),
    [
        ((1.2, 1.2, 1.2), 0.0, np.nan),
        ((1.0, 1.0, 2.0), 1.0, 1.0),  # a rod
        ((1.0, 2.0, 2.0), 1.0, 0.0),  # a slab
        ((1.0, 1.5, 2.25), np.sqrt(0.5), 0.5),
    ],
    ids=["alike", "rod", "slab", "between"],
)
def test_indices_by_hand(stretches: tuple[float, ...], adi: float, sri: float) -> None:
    of = np.array([stretches])
    assert anisotropic_deformation_index(of) == pytest.approx([adi])
    assert slab_rod_index(of) == pytest.approx([sri], nan_ok=True)


@PROPERTY
@given(stretches=STRETCHES, factor=st.floats(0.5, 2.0))
def test_indices_do_not_depend_on_the_volume_change(stretches: list[float], factor: float) -> None:
    of = np.array([stretches])
    assert anisotropic_deformation_index(factor * of) == pytest.approx(anisotropic_deformation_index(of), abs=1e-9)
    before, after = slab_rod_index(of), slab_rod_index(factor * of)
    assert (np.isnan(before) | np.isnan(after)).all() or after == pytest.approx(before, abs=1e-6)
    assert np.isnan(before).all() or 0 <= before[0] <= 1


# --- densities -------------------------------------------------------------------------------------------------------


def test_densities_by_hand() -> None:
    hu = np.array([-1000, -951, -950, -900, -800, 0], np.int16)
    assert low_attenuation_percent(hu, -950.0) == pytest.approx(100 * 2 / 6)
    assert percentile_hu(np.arange(-1000, -899).astype(np.int16)) == pytest.approx(-985)
    assert mean_lung_density_hu(hu) == pytest.approx(-4601 / 6)
    assert mass_g(hu, voxel_ml=2.0) == pytest.approx(2 * (0 + 0.049 + 0.05 + 0.1 + 0.2 + 1.0))
    none = hu[:0]
    assert np.isnan([low_attenuation_percent(none, 0.0), percentile_hu(none), mean_lung_density_hu(none)]).all()
    assert mass_g(none, 1.0) == 0


# --- which scan is which ---------------------------------------------------------------------------------------------


def test_the_larger_lungs_are_the_inspiration() -> None:
    assert which_is_inspiration(5.0, 3.0, FunctionSettings()) == ("fixed", [])
    assert which_is_inspiration(3.0, 5.0, FunctionSettings()) == ("moving", [])


def test_scans_that_are_alike_are_warned_of_or_refused() -> None:
    scan, said = which_is_inspiration(5.0, 4.2, FunctionSettings())
    assert scan == "fixed" and len(said) == 1 and "1.19 times" in said[0]
    scan, said = which_is_inspiration(5.0, 4.7, FunctionSettings())
    assert scan == "fixed" and len(said) == 2 and "differ little" in said[0]
    with pytest.raises(InputError, match=r"too alike .* --inspiration fixed or moving"):
        which_is_inspiration(5.0, 4.9, FunctionSettings())
    scan, said = which_is_inspiration(5.0, 4.9, FunctionSettings(inspiration="moving"))
    assert scan == "moving" and "though its lungs are smaller" in said[0]
