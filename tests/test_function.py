"""``lungreg function``: phantoms with known answers, the scans' own volumes, other programs, files."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.fields.transform import Transform
from algorithm.files.images import Image
from algorithm.function.deformation import deformation
from algorithm.function.quantities import QUANTITIES
from algorithm.function.regions import LOBES, Regions, read_lobes, regions_of
from algorithm.function.settings import FunctionSettings
from algorithm.function.table import Measured, measured
from algorithm.function.voxels import Case
from algorithm.geometry import Affine, Grid, jacobian_determinant
from algorithm.lungs import LungMask
from algorithm.preparation.subject import Subject
from algorithm.results.ownership import FUNCTION, is_own_image, remove_own_texts
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair
from tests.support.grids import sitk_image
from tests.support.made_up_results import FIXED, FIXED_LUNGS, MOVING, WAVY, blobs, write_result
from tests.support.pages import Reader
from tests.support.plastimatch import needs_plastimatch, plastimatch
from tests.support.running import call_main, lungreg, pair_options, results

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs" / "use" / "function.md").read_text()
Role = Literal["fixed", "moving"]


# --- uniform expansion: exact ----------------------------------------------------------------------------------------

GRID = Grid((56, 36, 40), (2.5, 2.5, 3.0), (-70.0, -40.0, 20.0))
SCALE = 1.2
"""Of every length, from expiration to inspiration."""
WHOLE = Affine.from_arrays(SCALE * np.eye(3), np.array([5.0, -7.0, 11.0]))
SIDE_VOX = 20
RIGHT_HU, LEFT_HU = -700.0, -900.0
"""At expiration. At inspiration -826 and -942: normal, and trapped air."""


def block(hu_right: float, hu_left: float, grid: Grid) -> Subject:
    """Two cubes of lung in tissue: the right one where x is small."""
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    voxels = torch.zeros(1, 1, *grid.shape)
    for x, hu in ((4, hu_right), (32, hu_left)):
        part = (0, 0, slice(8, 8 + SIDE_VOX), slice(8, 8 + SIDE_VOX), slice(x, x + SIDE_VOX))
        mask[part], voxels[part] = True, hu
    return Subject(Image(voxels, grid, Path("block.mha")), LungMask(mask, grid))


def expanded(hu: float) -> float:
    return (hu + 1000) / SCALE**3 - 1000


def expansion(inspiration: Role) -> Case:
    """The same two scans, registered one way or the other; half of the map in the field, half in the affine part."""
    x, y, z = WHOLE(np.array(GRID.origin)).tolist()
    sx, sy, sz = (SCALE * s for s in GRID.spacing)
    expiration = block(RIGHT_HU, LEFT_HU, GRID)
    inspired = block(expanded(RIGHT_HU), expanded(LEFT_HU), replace(GRID, spacing=(sx, sy, sz), origin=(x, y, z)))
    fixed, moving, whole = expiration, inspired, WHOLE
    if inspiration == "fixed":
        fixed, moving, whole = inspired, expiration, WHOLE.inverse()
    grid = fixed.image.grid
    k, j, i = np.indices(grid.shape)
    world = np.moveaxis(grid.to_world(np.stack([i, j, k], axis=-1)), -1, 0)
    grow = 1.1
    affine = Affine.from_arrays(np.array(whole.matrix) / grow, np.array(whole.offset))
    transform = Transform(torch.from_numpy((grow - 1) * world).float()[None], grid, affine)
    return Case(fixed, moving, transform, regions_of(fixed.lungs), regions_of(moving.lungs))


@pytest.fixture(scope="module", params=["fixed", "moving"])
def uniform(request: pytest.FixtureRequest) -> Measured:
    return measured(expansion(request.param))


def shares(hu: float) -> tuple[float, float]:
    """Of tissue, at inspiration and expiration."""
    return (expanded(hu) + 1000) / 1055, (hu + 1000) / 1055


def test_volumes_of_a_uniform_expansion(uniform: Measured) -> None:
    litres = SIDE_VOX**3 * np.prod(GRID.spacing) * 1e-6
    for region, number in (("both lungs", 2), ("right lung", 1), ("left lung", 1)):
        row = uniform.regions[region]
        for key in ("volume", "field_volume"):
            assert row[f"{key}_ex_l"] == pytest.approx(number * litres, rel=1e-5)
            assert row[f"{key}_in_l"] == pytest.approx(number * litres * SCALE**3, rel=1e-5)
        assert row["volume_change_l"] == pytest.approx(number * litres * (SCALE**3 - 1), rel=1e-5)
        assert row["volume_change_percent"] == pytest.approx(100 * (SCALE**3 - 1), rel=1e-5)
        assert (row["outside_percent"], row["uncertain_percent"]) == (0, 0)


def test_ventilation_of_a_uniform_expansion(uniform: Measured) -> None:
    for region, hu in (("right lung", RIGHT_HU), ("left lung", LEFT_HU)):
        row = uniform.regions[region]
        inside, outside = shares(hu)
        air = SCALE**3 * (1 - inside) / (1 - outside) - 1
        assert row["saj"] == pytest.approx(SCALE**3 - 1, rel=1e-5) and abs(row["saj_sd"] or 0) < 1e-5
        assert row["sacj"] == pytest.approx(air, rel=1e-4) and row["sai"] == pytest.approx(air, rel=1e-4)
        assert row["mass_factor"] == pytest.approx(1, abs=1e-5)
    both = [np.mean(pair) for pair in zip(shares(RIGHT_HU), shares(LEFT_HU), strict=True)]
    air = SCALE**3 * (1 - both[0]) / (1 - both[1]) - 1
    assert uniform.regions["both lungs"]["sacj"] == pytest.approx(air, rel=1e-4)


def test_classes_of_a_uniform_expansion(uniform: Measured) -> None:
    """The median leaves faces as they are, and takes edges and corners of a cube for what is around it."""
    voxel_ml = np.prod(GRID.spacing) / 1000
    cut = 12 * (SIDE_VOX - 2) + 8
    for region, name in (("right lung", "normal"), ("left lung", "fsad")):
        row = uniform.regions[region]
        assert row[f"prm_{name}_ml"] == pytest.approx((SIDE_VOX**3 - cut) * voxel_ml, rel=1e-5)
        assert row[f"prm_{name}_percent"] == 100
        assert row["left_out_percent"] == pytest.approx(100 * cut / SIDE_VOX**3, rel=1e-4)
    both = uniform.regions["both lungs"]
    assert both["prm_normal_percent"] == pytest.approx(50) and both["prm_emphysema_ml"] == both["prm_emptying_ml"] == 0


def test_deformation_and_densities_of_a_uniform_expansion(uniform: Measured) -> None:
    row, litre = uniform.regions["left lung"], SIDE_VOX**3 * np.prod(GRID.spacing) / 1000
    for number in (1, 2, 3):
        assert row[f"strain_{number}"] == pytest.approx((SCALE**2 - 1) / 2, abs=1e-4)
    assert row["adi"] == pytest.approx(0, abs=1e-4) and row["sri"] is None
    assert row["mld_ex_hu"] == row["perc15_ex_hu"] == LEFT_HU
    assert row["mld_in_hu"] == pytest.approx(expanded(LEFT_HU), abs=1e-3)
    assert row["mass_in_g"] == pytest.approx(row["mass_ex_g"], rel=1e-4) == pytest.approx(0.1 * litre, rel=1e-4)
    assert (row["laa856_ex_percent"], row["laa910_ex_percent"], row["laa910_in_percent"]) == (100, 0, 100)


def test_which_scan_is_fixed_does_not_matter() -> None:
    first, second = (measured(expansion(of)) for of in ("fixed", "moving"))
    assert (first.inspiration, second.inspiration) == ("fixed", "moving")
    assert first.regions.keys() == second.regions.keys()
    for region, row in first.regions.items():
        for key, value in row.items():
            other = second.regions[region][key]
            assert (value is None) == (other is None), (region, key)
            assert value is None or value == pytest.approx(other, rel=1e-3, abs=1e-4), (region, key)


def test_mass_that_comes_with_the_inspiration_is_corrected() -> None:
    case = expansion("moving")
    heavier = 1.05 * (case.moving.image.voxels + 1000) - 1000
    more = replace(case, moving=case.moving._replace(image=replace(case.moving.image, voxels=heavier)))
    corrected, not_corrected = (
        measured(more, FunctionSettings(mass_correction=of)).regions["right lung"]
        for of in ("on", "off")  # type: ignore[arg-type]
    )
    expected = measured(case).regions["right lung"]
    assert corrected["mass_factor"] == pytest.approx(1 / 1.05, rel=1e-4) and not_corrected["mass_factor"] == 1
    assert corrected["sai"] == pytest.approx(expected["sai"], rel=1e-3)
    assert not_corrected["sai"] < 0.95 * expected["sai"]  # type: ignore[operator]


def test_uncertain_places_are_counted_apart() -> None:
    """In the upper quarter of the lungs the expected error is 4 mm; the moving scan ends above half of them."""
    case = expansion("moving")
    at = GRID.to_world(np.array([0, 0, 8 + 3 * SIDE_VOX // 4]))[2]

    def error(grid: Grid) -> np.ndarray:
        z = grid.to_world(np.stack([np.zeros(grid.size[2])] * 2 + [np.arange(grid.size[2])], axis=-1))[:, 2]
        return np.broadcast_to(np.where(z >= at - 0.01, 4.0, 0.5)[:, None, None], grid.shape)

    row = measured(replace(case, error=error)).regions["both lungs"]
    assert row["uncertain_percent"] == pytest.approx(25) and row["outside_percent"] == 0
    assert row["saj"] == pytest.approx(SCALE**3 - 1, rel=1e-5)
    wider = measured(replace(case, error=error), FunctionSettings(most_error_mm=4.5)).regions["both lungs"]
    assert wider["uncertain_percent"] == 0
    whole = case.moving.image
    nx, ny, _ = whole.grid.size
    cut = replace(whole, voxels=whole.voxels[:, :, :18], grid=whole.grid.cropped((0, 0, 0), (nx, ny, 18)))
    row = measured(replace(case, error=error, moving=case.moving._replace(image=cut))).regions["both lungs"]
    assert row["outside_percent"] == pytest.approx(50) and row["uncertain_percent"] == 0
    assert row["prm_normal_ml"] == pytest.approx(row["prm_fsad_ml"])


def test_a_region_of_which_nothing_is_certain_has_no_measures() -> None:
    case = expansion("moving")
    row = measured(replace(case, error=lambda grid: np.full(grid.shape, 9.0))).regions["both lungs"]
    assert row["uncertain_percent"] == pytest.approx(100) and row["volume_in_l"]
    assert {row[key] for key in ("saj", "sacj", "sai", "strain_1", "adi", "prm_normal_percent")} == {None}


# --- a phantom that breathes: exact field ----------------------------------------------------------------------------

BREATHING = PhantomSettings(fixed_grid=chest_grid((60, 48, 56)), noise_hu=0.0)


def case_of(pair: PhantomPair) -> Case:
    """With exact lobes; and the exact field, which jumps at the wall of the chest."""
    fixed, moving = (
        Subject(Image(hu.float(), grid, Path("phantom.mha")), LungMask(lobes > 0, grid))
        for hu, grid, lobes in (
            (pair.fixed, pair.fixed_grid, pair.fixed_lobes),
            (pair.moving, pair.moving_grid, pair.moving_lobes),
        )
    )
    first, then = (
        replace(regions_of(of.lungs), lobes=lobes, lobes_grid=of.lungs.grid)
        for of, lobes in ((fixed, pair.fixed_lobes), (moving, pair.moving_lobes))
    )
    return Case(fixed, moving, Transform(pair.displacement_mm, pair.fixed_grid), first, then)


@pytest.fixture(scope="module")
def breathing() -> tuple[Measured, Measured]:
    """With the inspiration as the fixed scan, and as the moving one."""
    inhaled, exhaled = make_pair(BREATHING), make_pair(replace(BREATHING, fixed_phase="exhale"))
    return measured(case_of(inhaled)), measured(case_of(exhaled))


def test_the_jacobian_carries_volumes_over(breathing: tuple[Measured, Measured]) -> None:
    """Mean determinant times fixed volume is the moving volume, for each lung and lobe."""
    for found in breathing:
        assert set(found.regions) == {"both lungs", "right lung", "left lung", *LOBES}
        for region, row in found.regions.items():
            for key in ("in", "ex"):
                carried, own = row[f"field_volume_{key}_l"], row[f"volume_{key}_l"]
                assert carried == pytest.approx(own, rel=0.04 if "lobe" in region else 0.025), (region, key)


def test_both_directions_say_the_same(breathing: tuple[Measured, Measured]) -> None:
    """But for strains: the exact field jumps at the chest wall, and differently in the two directions."""
    first, second = (found.regions for found in breathing)
    for region in first:
        for key, tolerance in {"saj": 0.003, "sacj": 0.005, "sai": 0.02, "mass_factor": 0.005}.items():
            assert first[region][key] == pytest.approx(second[region][key], abs=tolerance), (region, key)
        for name in ("normal", "fsad", "emphysema", "emptying"):
            key = f"prm_{name}_percent"
            assert first[region][key] == pytest.approx(second[region][key], abs=1), (region, key)


def test_the_phantom_keeps_its_mass(breathing: tuple[Measured, Measured]) -> None:
    for found in breathing:
        row = found.regions["both lungs"]
        assert row["mass_in_g"] == pytest.approx(row["mass_ex_g"], rel=0.08)  # its vessels do not become denser
        assert row["mass_factor"] == pytest.approx(1, abs=0.08)
        assert row["sacj"] == pytest.approx(row["sai"], rel=1e-4)  # by the mass correction
        assert row["sacj"] > row["saj"] > 0.1  # type: ignore[operator]


# --- determinants, by other programs ---------------------------------------------------------------------------------

PLAIN = Grid((40, 36, 32), (4.0, 4.5, 5.0), (-70.0, -80.0, 100.0))
"""Without a rotation: SimpleITK's filter is wrong with one."""


def plain_field() -> sitk.Image:
    vectors = WAVY.displacement[0].permute(1, 2, 3, 0).double().contiguous().numpy()
    field = sitk.GetImageFromArray(vectors, isVector=True)
    field.SetSpacing(PLAIN.spacing)
    field.SetOrigin(PLAIN.origin)
    return field


def ours() -> np.ndarray:
    lungs = LungMask(torch.ones(1, 1, *PLAIN.shape, dtype=torch.bool), PLAIN)
    found, grid = deformation(Transform(WAVY.displacement, PLAIN), lungs)
    assert grid == PLAIN
    assert found[0, 1:].prod(dim=0).numpy() == pytest.approx(found[0, 0].numpy(), rel=1e-4)  # λ₁ λ₂ λ₃ = det F
    return found[0, 0].numpy()


def test_the_determinant_is_simpleitks() -> None:
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(plain_field()))
    inner = (slice(1, -1),) * 3
    assert np.std(theirs[inner]) > 0.05
    np.testing.assert_allclose(ours()[inner], theirs[inner], atol=1e-5)
    own = jacobian_determinant(WAVY.displacement, PLAIN)[0].numpy()
    np.testing.assert_allclose(ours(), own, atol=1e-5)


@needs_plastimatch
def test_the_determinant_is_plastimatchs(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Cast(plain_field(), sitk.sitkVectorFloat32), str(tmp_path / "field.mha"))
    plastimatch("jacobian", "--input", tmp_path / "field.mha", "--output-img", tmp_path / "jacobian.mha")
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "jacobian.mha")))
    inner = (slice(1, -1),) * 3
    assert np.std(theirs[inner]) > 0.05
    np.testing.assert_allclose(ours()[inner], theirs[inner], atol=1e-5)


def test_the_determinant_is_that_of_ants(tmp_path: Path) -> None:
    """ANTs' geometric and finite-difference ways differ by themselves; in the mean both agree."""
    ants = pytest.importorskip("ants", reason="ANTs is not installed")
    path = tmp_path / "field.nii.gz"
    sitk.WriteImage(plain_field(), str(path))
    domain = ants.from_numpy(np.zeros(PLAIN.size, np.float32), PLAIN.origin, PLAIN.spacing)
    theirs = ants.create_jacobian_determinant_image(domain, str(path)).numpy().T
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(ours()[inner], theirs[inner], atol=0.02)


# --- lobes of other programs -----------------------------------------------------------------------------------------


def test_lobes_of_lungmask_and_totalsegmentator(tmp_path: Path) -> None:
    labels = np.zeros(FIXED.shape, np.uint8)
    for label in range(1, 6):
        labels[4 * label : 4 * label + 4] = label
    sitk.WriteImage(sitk_image(labels, FIXED), str(tmp_path / "lungmask.nii.gz"))
    theirs = np.where(labels > 0, labels + 9, 1).astype(np.uint8)  # 1: the spleen
    sitk.WriteImage(sitk_image(theirs, FIXED), str(tmp_path / "total.nii.gz"))
    (tmp_path / "folder").mkdir()
    for name, label in LOBES.items():
        side, part, _ = name.split()
        of = (labels == label).astype(np.uint8)
        sitk.WriteImage(sitk_image(of, FIXED), str(tmp_path / "folder" / f"lung_{part}_lobe_{side}.nii.gz"))
    for name in ("lungmask.nii.gz", "total.nii.gz", "folder"):
        found, grid = read_lobes(tmp_path / name)
        assert (found == labels).all() and grid.size == FIXED.size


# --- the command and its files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result that was made up, and its scans, in the folder where the test then is."""
    for name, grid in (("now", FIXED), ("before", MOVING)):
        sitk.WriteImage(sitk_image(blobs(grid, "int16"), grid), str(tmp_path / f"{name}.mha"))
    monkeypatch.chdir(tmp_path)
    result = write_result(tmp_path / "result")
    figures = json.loads((result / "results.json").read_text())
    figures["paths"] = {"fixed": "../now.mha", "moving": "../before.mha"}
    (result / "results.json").write_text(json.dumps(figures))
    return result


def rows(folder: Path) -> dict[str, dict[str, str]]:
    content = (folder / FUNCTION[1]).read_text()
    return {row["region"]: row for row in csv.DictReader(io.StringIO(content))}


def test_table_and_images_are_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lungreg("function", folder) == 0
    said = capfd.readouterr().out
    assert "Inspiration: the fixed scan (now.mha), 0.42 l; expiration: the moving scan (before.mha)" in said
    table, content = rows(folder), json.loads((folder / FUNCTION[0]).read_text())
    assert list(table["both lungs"]) == ["region", *(quantity.key for quantity in QUANTITIES)]
    assert content["inspiration"] == "fixed" and content["settings"]["prm_inspiration_hu"] == -950
    for key, value in content["regions"]["both lungs"].items():
        assert table["both lungs"][key] == ("" if value is None else f"{value:.6g}")
    images = folder / "images" / "function"
    names = {path.name for path in images.iterdir()}
    assert names == {f"{name}.mha" for name in ("prm", "saj", "sacj", "sai", "adi", "sri")} | {"prm.ctbl"}
    prm, saj = (sitk.ReadImage(str(images / f"{name}.mha")) for name in ("prm", "saj"))
    labels, change = (sitk.GetArrayFromImage(of) for of in (prm, saj))
    voxel_ml = np.prod(prm.GetSpacing()) / 1000
    assert (labels > 0).sum() * voxel_ml == pytest.approx(1000 * float(table["both lungs"]["volume_in_l"]), rel=1e-4)
    assert (change[labels == 0] == -1).all() and (change[(labels > 0) & (labels < 6)] > -1).all()
    place = prm.TransformIndexToPhysicalPoint([int(n) for n in np.argwhere(labels > 0)[0][::-1]])
    index = FIXED_LUNGS.grid.to_index(np.array(place))
    assert ((index > -1) & (index < FIXED_LUNGS.grid.size)).all()


def test_a_second_call_replaces_the_first_and_nothing_else(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert lungreg("function", folder) == 0
    first = rows(folder)
    (folder / "images" / "function" / "notes.txt").write_text("mine")
    assert lungreg("function", folder, "--prm-inspiration-hu=-700", "--prm-expiration-hu=-600", "--tissue-hu=0") == 0
    assert rows(folder) != first
    assert {path: path.read_bytes() for path in before} == before
    (folder / FUNCTION[1]).write_text("mine")
    capfd.readouterr()
    assert lungreg("function", folder) == 2
    assert "was not written by this program" in capfd.readouterr().err
    assert (folder / FUNCTION[1]).read_text() == "mine"


def test_what_is_missing_or_another_scan_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sitk.WriteImage(sitk_image(np.full(FIXED.shape, 40, np.uint8), FIXED), "all.mha")
    for arguments, says in (
        ([folder / "nowhere"], "cannot be read"),
        ([folder, "--fixed=before.mha"], "before.mha: lies on another grid than the fixed scan"),
        ([folder, "--fixed-lobes=all.mha"], "all.mha: has the labels 40, expected lobes"),
        ([folder, "--filter-voxels=2"], "--filter-voxels is 2"),
    ):
        assert lungreg("function", *arguments) == 2
        assert says in capfd.readouterr().err.splitlines()[-1]
    Path("before.mha").rename("elsewhere.mha")
    assert lungreg("function", folder) == 2
    assert "expected --moving with its new place" in capfd.readouterr().err
    assert not (folder / FUNCTION[0]).exists() and not (folder / "images").exists()
    assert lungreg("function", folder, "--moving=elsewhere.mha") == 0


def test_without_kept_lungs_masks_stand_for_them(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As with --transforms off: the field alone is there."""
    from algorithm.files.writing import write_field, write_image

    plain = folder.parent / "plain"
    (plain / "images" / "displacement-field").mkdir(parents=True)
    write_field(plain / "images" / "displacement-field" / "now.mha", FIXED, [WAVY.field(FIXED)], "itk")
    figures = json.loads((folder / "results.json").read_text())
    del figures["inverse_residual_mm"]
    (plain / "results.json").write_text(json.dumps(figures))
    from tests.support.made_up_results import MOVING_LUNGS

    for name, lungs in (("f", FIXED_LUNGS), ("m", MOVING_LUNGS)):
        padded = torch.nn.functional.pad(lungs.mask.to(torch.uint8), [4] * 6)
        write_image(Path(f"{name}.mha"), padded, lungs.grid.padded(4))
    assert lungreg("function", plain, "--fixed-mask=f.mha", "--moving-mask=m.mha") == 0, capfd.readouterr().err
    assert lungreg("function", folder) == 0
    whole, other = rows(folder)["both lungs"], rows(plain)["both lungs"]
    assert float(other["volume_in_l"]) == pytest.approx(float(whole["volume_in_l"]), rel=1e-3)
    assert float(other["mld_ex_hu"]) == pytest.approx(float(whole["mld_ex_hu"]), abs=0.1)


def test_a_registration_measures_it_as_well(tmp_path: Path, example: Path, small_weights: Path) -> None:
    """--also function: files and a section of the page, gone with the next registration; the command says the same."""
    options = pair_options(example, tmp_path / "out", small_weights)
    assert call_main(*options, "--also=function", "--report=on", "--transforms=on") == 0
    out = tmp_path / "out"
    first, page = rows(out), (out / "report.html").read_text()
    assert set(first) == {"both lungs", "right lung", "left lung"}
    assert "Lung function" in Reader(page).text and "PRM fsad (%)" in Reader(page).text
    assert "function" in results(out)["timings_s"] and is_own_image(out / "images" / "function" / "saj.mha")
    shutil.copy(example / "fixed.mha", out)
    shutil.copy(example / "moving.mha", out)
    assert lungreg("function", out) == 0
    again = (out / "report.html").read_text()
    assert again.count('<h2 id="function">') == page.count('<h2 id="function">') == 1
    for key, value in first["both lungs"].items():
        if key != "region" and value:
            assert float(rows(out)["both lungs"][key]) == pytest.approx(float(value), rel=0.02, abs=0.02), key
    assert call_main(*options) == 0
    assert not (out / FUNCTION[0]).exists() and not (out / "images" / "function").exists()


def test_scans_that_are_alike_do_not_stop_a_registration(tmp_path: Path, example: Path, small_weights: Path) -> None:
    files = [f"--fixed={example / 'fixed.mha'}", f"--moving={example / 'fixed.mha'}", f"--output={tmp_path / 'out'}"]
    assert call_main(*files, f"--weights={small_weights}", "--device=cpu", "--also=function") == 0
    assert any(
        "Lung function was not measured: the lungs are too alike" in w for w in results(tmp_path / "out")["warnings"]
    )
    assert not (tmp_path / "out" / FUNCTION[0]).exists()


def test_what_others_wrote_stays_when_a_registration_begins(tmp_path: Path) -> None:
    (tmp_path / "images" / "function").mkdir(parents=True)
    for name in (*FUNCTION, "images/function/prm.ctbl"):
        (tmp_path / name).write_text("{}")
    remove_own_texts(tmp_path)
    assert all((tmp_path / name).exists() for name in (*FUNCTION, "images/function/prm.ctbl"))


# --- the page on it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.key)
def test_definitions_are_those_of_the_page(quantity: object) -> None:
    assert f"| `{quantity.key}` | {quantity.title} | {quantity.definition} |" in PAGE.splitlines()  # type: ignore[attr-defined]


def test_the_page_defines_nothing_else() -> None:
    keys = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 4]
    assert [key for key in keys if not key.startswith("--")] == [quantity.key for quantity in QUANTITIES]


def test_the_definitions_name_the_defaults() -> None:
    text, settings = " ".join(quantity.definition for quantity in QUANTITIES), FunctionSettings()
    for value in (settings.ceiling_hu, settings.floor_hu, settings.prm_inspiration_hu, settings.prm_expiration_hu):
        assert f"{value:g} HU" in text
    assert f"{settings.tissue_hu + 1000:g}" in text and f"{settings.most_error_mm:g} mm" in text
    assert " × ".join([str(settings.filter_voxels)] * 3) in text


def test_regions_without_lobes_have_none() -> None:
    regions = Regions(torch.ones(1, 1, *FIXED_LUNGS.grid.shape, dtype=torch.uint8), FIXED_LUNGS.grid)
    inside, labels = regions.at(FIXED_LUNGS.grid)
    assert inside.all() and list(labels.names()) == ["both lungs", "right lung"]


def test_a_cohort_measures_by_the_files_of_its_table(folder: Path) -> None:
    """Wherever results.json says that they lay."""
    from algorithm.cohort.done import pair_folder
    from algorithm.cohort.steps import function as step
    from algorithm.cohort.table import Row

    result = pair_folder(folder.parent / "out", "s1")
    result.parent.mkdir(parents=True)
    folder.rename(result)
    row = Row(2, "s1", {"fixed": "now.mha", "moving": "before.mha"}, folder.parent)
    assert row.path("fixed_mask") is None
    step(row, folder.parent / "out")
    assert (result / FUNCTION[0]).exists()
