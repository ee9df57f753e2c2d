"""What is looked for in /input, and what is left in /output."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithm.errors import InputError
from algorithm.files.folders import find_inputs, image_name
from algorithm.files.inputs import Inputs
from algorithm.files.writing import write_image_slabs
from algorithm.geometry import Grid
from algorithm.results.outputs import field_layout, image_kind, prepare_outputs, sole_image, sole_writer, withdraw
from algorithm.results.ownership import PAGE_MARK, result_mark
from algorithm.results.texts import write_results
from tests.support.refusals import refusal
from tests.support.strategies import examples


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def socket(slug: object, relative_path: object) -> dict[str, object]:
    return {"slug": slug, "relative_path": relative_path, "kind": "Image"}


def platform(root: Path, content: object) -> None:
    root.mkdir(exist_ok=True)
    (root / "inputs.json").write_text(content if isinstance(content, str) else json.dumps(content))


PAIR = [
    {"pk": 1, "socket": socket("fixed-image", "images/fixed"), "interface": socket("old", "old")},
    {"pk": 2, "socket": None, "interface": socket("moving-image", "images/ct/moving")},
]

# --- input -----------------------------------------------------------------------------------------------------------


def test_platform_files(tmp_path):
    platform(tmp_path, [*PAIR, {"socket": socket("age", "age.json"), "value": 70}])
    touch(tmp_path, "images/fixed/0a1b.mha", "images/ct/moving/2c3d.mha", "images/ct/moving/.hidden.mha", "age.json")
    touch(tmp_path, "fixed.mha", "moving.mha")  # inputs.json comes first
    expected = Inputs(tmp_path / "images/fixed/0a1b.mha", tmp_path / "images/ct/moving/2c3d.mha", platform=True)
    assert find_inputs(tmp_path) == expected


def test_platform_masks(tmp_path):
    slugs = ("fixed-image", "moving-image", "fixed-mask", "moving-mask")
    platform(tmp_path, [{"socket": socket(s, f"images/{s}")} for s in slugs])
    touch(tmp_path, *(f"images/{s}/a.mha" for s in slugs))
    found = find_inputs(tmp_path)
    assert (found.fixed_mask, found.moving_mask) == tuple(tmp_path / f"images/{s}/a.mha" for s in slugs[2:])
    (tmp_path / "images/moving-mask/a.mha").unlink()  # announced, but not there
    assert "no image for moving-mask" in refusal(find_inputs, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("[{", "not valid JSON"),
        ("\ufeff[]", "sockets none"),
        ("[" * 100_000, "not valid JSON"),
        ({}, "a JSON dict, expected a list"),
        (None, "a JSON NoneType, expected a list"),
        ([], "sockets none"),
        ([1], "entry 1"),
        ([PAIR[0], {"pk": 2}], "entry 2"),
        ([PAIR[0], {"socket": "moving-image"}], "entry 2"),
        ([PAIR[0], {"socket": socket(7, "images/moving")}], "entry 2"),
        ([PAIR[0], {"socket": socket("moving-image", None)}], "entry 2"),
        ([PAIR[0], {"socket": socket("moving-image", "../secret")}], "path inside"),
        ([PAIR[0], {"socket": socket("moving-image", "/etc")}], "path inside"),
        ([PAIR[0], PAIR[0], PAIR[1]], "several entries for fixed-image"),
        ([PAIR[0]], "expected also moving-image"),
        (PAIR, "no image for moving"),
    ],
)
def test_bad_inputs_json(tmp_path, content, says):
    platform(tmp_path, content)
    touch(tmp_path, "images/fixed/a.mha", "moving.mha")
    assert says in refusal(find_inputs, tmp_path)


@examples(100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("fixed-image"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["socket", "interface", "slug", "relative_path"]), inner)
        ),
    )
)
def test_any_other_json_is_bad_input(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("input")
    platform(root, content)
    refusal(find_inputs, root)


@pytest.mark.parametrize("suffix", ["", "-image"])
def test_folders(tmp_path, suffix):
    fixed, moving = f"images/fixed{suffix}/exhale.nii.gz", f"images/moving{suffix}/inhale.mhd"
    touch(tmp_path, fixed, moving, f"images/moving{suffix}/inhale.raw", f"images/moving{suffix}/.inhale.mhd.swp")
    touch(tmp_path, "images/fixed-mask/m.mha", f"images/fixed{suffix}/notes.txt")
    assert find_inputs(tmp_path) == Inputs(tmp_path / fixed, tmp_path / moving, tmp_path / "images/fixed-mask/m.mha")


@pytest.mark.parametrize("mask", ["fixed-mask.nrrd", "fixed_mask.nrrd"])
def test_plain_files(tmp_path, mask):
    touch(tmp_path, "fixed.NRRD", "moving.nii.gz", "moving.txt", ".fixed.mha", "fixed.raw", mask)
    (tmp_path / "images" / "fixed").mkdir(parents=True)  # empty: not meant
    assert find_inputs(tmp_path) == Inputs(tmp_path / "fixed.NRRD", tmp_path / "moving.nii.gz", tmp_path / mask)


def test_link_to_the_folder_is_not_resolved(tmp_path):
    touch(tmp_path, "real/fixed.mha", "real/moving.mha")
    (tmp_path / "input").symlink_to("real")
    assert find_inputs(tmp_path / "input").fixed == tmp_path / "input" / "fixed.mha"


@pytest.mark.parametrize("name", ["im1.dcm", "IM1.DCM", "im1"])
@pytest.mark.parametrize("place", ["images/fixed", "images/fixed-image", "fixed"])
def test_folder_of_dicom_files(tmp_path, name, place):
    touch(tmp_path, f"{place.replace('fixed', 'moving')}/moving.mha" if "images" in place else "moving.mha")
    touch(tmp_path, f"{place}/README", f"{place}/.hidden.dcm")
    assert "no image for fixed" in refusal(find_inputs, tmp_path)
    (tmp_path / place / name).write_bytes(bytes(128) + b"DICM")  # the mark is in every file, the ending is not
    found = find_inputs(tmp_path)
    assert found.fixed == tmp_path / place and found.moving.name == "moving.mha"
    touch(tmp_path, f"{place}/below/im2.dcm", f"{place}.mha" if place == "fixed" else f"{place}/a.mha")
    both = "fixed.mha, fixed for fixed" if place == "fixed" else f"{place}/a.mha, {place} for"
    assert both in refusal(find_inputs, tmp_path)


def test_folder_of_dicom_files_on_the_platform(tmp_path):
    platform(tmp_path, PAIR)
    touch(tmp_path, "images/fixed/a.mha", "images/ct/moving/im1.dcm")
    assert find_inputs(tmp_path).moving == tmp_path / "images/ct/moving"


def test_says_what_was_looked_for_and_what_was_there(tmp_path):
    assert "no such folder" in refusal(find_inputs, tmp_path / "none")
    message = refusal(find_inputs, tmp_path)
    assert "images/fixed/, images/fixed-image/ or fixed.*" in message and "no files" in message
    touch(tmp_path, "scan1.dcm", "images/fixed/one.mha")
    message = refusal(find_inputs, tmp_path)
    assert "no image for moving" in message and "images/fixed/one.mha, scan1.dcm" in message
    touch(tmp_path, "images/moving/a.mha", "images/fixed-image/two.mha")
    assert "images/fixed/one.mha, images/fixed-image/two.mha for fixed" in refusal(find_inputs, tmp_path)
    touch(tmp_path, *(f"slice{i}" for i in range(20)))
    assert "and 16 more" in refusal(find_inputs, tmp_path)


def test_several_files_are_refused(tmp_path):
    touch(tmp_path, "fixed.mha", "fixed.nii", "moving.mha")
    assert "fixed.mha, fixed.nii for fixed" in refusal(find_inputs, tmp_path)
    (tmp_path / "fixed.nii").unlink()
    touch(tmp_path, "moving-mask.mha", "moving_mask.mha")
    assert "moving-mask.mha, moving_mask.mha for moving-mask" in refusal(find_inputs, tmp_path)


@pytest.mark.parametrize("place", ["fixed.mha", "images/fixed/a.mha"])
def test_a_link_to_nothing_is_found_so_that_reading_it_tells(tmp_path, place):
    touch(tmp_path, "moving.mha", "images/moving/b.mha")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).symlink_to("gone.mha")
    if place == "fixed.mha":
        (tmp_path / "images" / "moving" / "b.mha").unlink()
    assert find_inputs(tmp_path).fixed == tmp_path / place
    touch(tmp_path, str(Path(place).with_suffix(".nii")))
    assert find_inputs(tmp_path).fixed == (tmp_path / place).with_suffix(".nii")


def test_image_name():
    names = ("a.mha", "a.nii.gz", "a.b.NRRD", "a", ".mha")
    assert [image_name(Path(n)) for n in names] == ["a", "a", "a.b", "a", ""]


def test_image_name_of_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "1.2.840"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert [image_name(p) for p in (folder, Path(), folder / "..")] == ["1.2.840", "1.2.840", tmp_path.name]


@pytest.mark.parametrize("closed", ["", "images", "images/fixed"])
@pytest.mark.parametrize("form", ["platform", "folders"])
def test_a_folder_that_cannot_be_searched_is_said(tmp_path, as_nobody, closed, form):
    root = tmp_path / "input"
    touch(root, "images/fixed/a.mha", "images/ct/moving/b.mha", "images/moving/b.mha")
    if form == "platform":
        platform(root, PAIR)
    folder = (root / closed).resolve()
    for mode in (0o000, 0o600, 0o444):
        folder.chmod(mode)
        with as_nobody():
            message = refusal(find_inputs, root)
        folder.chmod(0o755)
        assert f"{folder}: cannot be " in message and "(Permission denied)" in message


# --- output ----------------------------------------------------------------------------------------------------------


def test_names_that_say_what_the_images_are(tmp_path):
    outputs = prepare_outputs(tmp_path, "a", suffixes=True)
    assert outputs.displacement_field == tmp_path / "images" / "displacement-field" / "a_field.mha"
    assert outputs.warped_moving == tmp_path / "images" / "warped-moving" / "a_warped.mha"
    assert outputs.expected_error == tmp_path / "images" / "expected-error" / "a_error.mha"
    outputs = prepare_outputs(tmp_path, "a", kind=".nii.gz")
    assert outputs.warped_moving == tmp_path / "images" / "warped-moving" / "a.nii.gz"


@pytest.mark.parametrize(
    ("option", "fixed", "layout", "kind"),
    [
        ("auto", "a.nii.gz", "itk", ".nii.gz"),
        ("auto", "a.NII", "itk", ".nii.gz"),
        ("auto", "a.nrrd", "itk", ".nrrd"),
        ("auto", "a.mhd", "itk", ".mha"),
        ("auto", "dicom", "itk", ".mha"),
        ("mha", "a.nii.gz", "itk", ".mha"),
        ("nrrd", "dicom", "itk", ".nrrd"),
        ("auto", "a.nii.gz", "grand-challenge", ".mha"),
    ],
)
def test_images_are_written_in_the_format_of_the_fixed_one(option, fixed, layout, kind):
    assert image_kind(option, Path(fixed), layout) == kind


def test_the_platform_takes_mha_only():
    with pytest.raises(InputError, match=r"--format nrrd: .* expected that"):
        image_kind("nrrd", Path("a.nrrd"), "grand-challenge")


def test_prepare_outputs_makes_nothing(tmp_path):
    outputs = prepare_outputs(tmp_path / "out", "case.1")
    assert outputs.displacement_field == tmp_path / "out/images/displacement-field/case.1.mha"
    assert outputs.warped_moving == tmp_path / "out/images/warped-moving/case.1.mha"
    assert outputs.results == tmp_path / "out/results.json"
    assert outputs.page is None and prepare_outputs(tmp_path, "case", page=True).page == tmp_path / "report.html"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "x" * 201])
def test_refuses_bad_case_names(tmp_path, name):
    with pytest.raises(InputError, match="expected a short file name"):
        prepare_outputs(tmp_path, name)


def test_refuses_outputs_that_cannot_be_written(tmp_path, as_nobody):
    touch(tmp_path, "file")
    with pytest.raises(InputError, match=r"file/images.*Not a directory"):
        prepare_outputs(tmp_path / "file", "case")
    folder = tmp_path / "out" / "images"
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    tmp_path.chmod(0o755)
    with as_nobody(), pytest.raises(InputError, match=r"displacement-field: cannot be written \(Permission denied\)"):
        prepare_outputs(tmp_path / "out", "case")


def write_result(root: Path, name: str, mark: str | None = None) -> Path:
    """A result as an earlier run left it, or with the mark of another name."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8)
    comment = result_mark(path) if mark is None else mark
    write_image_slabs(path, Grid((2, 2, 2), (1.0, 1.0, 1.0)), [voxels], torch.uint8, comment)
    return path


FIELD, WARPED = "images/displacement-field/case.mha", "images/warped-moving/case.mha"
FORMATS = (".mha", ".nrrd", ".nii.gz")
WARPED_IN = "images/warped-moving"
RESULTS = {"version": "1.0.0", "timings_s": {}, "warnings": []}


def whole(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def write_case(root: Path) -> None:
    """All that a run leaves."""
    write_result(root, FIELD)
    write_result(root, WARPED)
    (root / "results.json").write_text(json.dumps(RESULTS))
    (root / "report.html").write_text(f"<!DOCTYPE html>\n<!-- {PAGE_MARK} -->\n<html></html>")


def read_and_write(path: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(path)), str(path))


def by_nibabel(path: Path) -> None:
    """With the header that it had."""
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine, image.header), path)


FOREIGN = {
    "another name": lambda root: touch(root, "images/displacement-field/patient.mha"),
    "another format": lambda root: touch(root, "images/warped-moving/own.nrrd"),
    "a result in another format, changed": lambda root: read_and_write(write_result(root, f"{WARPED_IN}/a.nrrd")),
    "a result in NIfTI, changed": lambda root: read_and_write(write_result(root, f"{WARPED_IN}/a.nii.gz")),
    "a result in NIfTI, changed by nibabel": lambda root: by_nibabel(write_result(root, f"{WARPED_IN}/a.nii.gz")),
    "the name of the result": lambda root: touch(root, WARPED),
    "the name of the result, but a folder": lambda root: (root / WARPED).mkdir(parents=True),
    "the name of the result, but a link to nothing": lambda root: (
        (root / "images/warped-moving").mkdir(parents=True),
        (root / WARPED).symlink_to("nothing.mha"),
    ),
    "a result under another name": lambda root: write_result(root, FIELD).rename(root / FIELD.replace("case", "kept")),
    "a result that another program changed": lambda root: read_and_write(write_result(root, FIELD)),
    "an image without a mark": lambda root: write_result(root, FIELD, ""),
    "a link to a result": lambda root: (
        write_result(root / "elsewhere", FIELD),
        (root / "images/displacement-field").mkdir(parents=True),
        (root / FIELD).symlink_to(root / "elsewhere" / FIELD),
    ),
    "results of another program": lambda root: touch(root, "results.json"),
    "results of another program, JSON": lambda root: (
        root.mkdir(exist_ok=True),
        (root / "results.json").write_text('{"version": 2}'),
    ),
    "a page of another program": lambda root: touch(root, "report.html"),
    "a page of another program, HTML": lambda root: (
        root.mkdir(exist_ok=True),
        (root / "report.html").write_text(f"<!DOCTYPE html>\n<html>{PAGE_MARK}</html>"),
    ),
    "a link to a page": lambda root: (
        write_case(root / "elsewhere"),
        (root / "report.html").symlink_to(root / "elsewhere" / "report.html"),
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_this_program_did_not_write_is_refused_and_stays(tmp_path, kind):
    FOREIGN[kind](tmp_path)
    before = whole(tmp_path)
    withdraw(tmp_path, images=True)
    with pytest.raises(InputError, match=r"was not written by this program, .* expected another folder"):
        prepare_outputs(tmp_path, "case", page=True)
    assert whole(tmp_path) == before
    with sole_image(tmp_path / "images/warped-moving/new.mha") as path:  # it came while the case was computed
        path.write_bytes(b"new")
    assert before.items() <= whole(tmp_path).items()


def test_what_this_program_wrote_is_no_obstacle(tmp_path):
    write_case(tmp_path)
    for kind in FORMATS:
        write_result(tmp_path, f"images/displacement-field/another case{kind}")
    touch(tmp_path, "images/displacement-field/notes.txt", "images/warped-moving/.hidden.mha", "notes.mha")
    prepare_outputs(tmp_path, "case", page=True)


def test_another_page_is_no_obstacle_where_none_is_wanted(tmp_path):
    touch(tmp_path, "report.html")
    prepare_outputs(tmp_path, "case")
    withdraw(tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("way", ["itself", "link", "hard link", "relative"])
def test_an_input_among_the_results_is_refused_and_stays(tmp_path, monkeypatch, way):
    """Even one that an earlier run wrote."""
    write_case(tmp_path)
    given = tmp_path / WARPED
    if way == "link":
        (tmp_path / "moving.mha").symlink_to(given)
        given = tmp_path / "moving.mha"
    elif way == "hard link":
        (tmp_path / "moving.mha").hardlink_to(given)
        given = tmp_path / "moving.mha"
    elif way == "relative":
        monkeypatch.chdir(tmp_path / "images")
        given = Path("..") / WARPED
    for name in ("case", "another"):  # whether it would be written over or removed
        with pytest.raises(InputError, match=r"warped-moving/case\.mha: is an input"):
            prepare_outputs(tmp_path, name, [given])
    with sole_image(tmp_path / "images/warped-moving/new.mha", [given]) as path:
        path.write_bytes(b"new")
    assert (tmp_path / WARPED).exists()


def test_an_earlier_result_is_withdrawn(tmp_path):
    withdraw(tmp_path / "not there", images=True)
    assert not list(tmp_path.iterdir())
    write_case(tmp_path)
    withdraw(tmp_path)
    assert whole(tmp_path).keys() == {FIELD, WARPED}
    write_case(tmp_path)
    touch(tmp_path, "images/warped-moving/own.nrrd", "notes.txt")
    withdraw(tmp_path, images=True)
    assert whole(tmp_path).keys() == {"images/warped-moving/own.nrrd", "notes.txt"}


@pytest.mark.parametrize("way", ["below", "linked folder", "linked file", "hard link"])
def test_withdrawing_spares_inputs(tmp_path, way):
    out, source = tmp_path / "out", tmp_path / "in"
    write_case(out)
    source.mkdir()
    if way == "linked folder":
        (source / "images").symlink_to(out / "images" / "warped-moving")
        (source / "loop").symlink_to(source)
    elif way == "linked file":
        (source / "fixed.mha").symlink_to(out / WARPED)
    elif way == "hard link":
        (source / "fixed.mha").hardlink_to(out / WARPED)
    else:
        source = out / "images" / "warped-moving"
    withdraw(out, images=True, inputs=[source])
    assert whole(out).keys() == {WARPED}


def test_nothing_is_withdrawn_while_another_run_writes(tmp_path):
    with sole_writer(tmp_path):
        write_case(tmp_path)
        withdraw(tmp_path, images=True)
        assert whole(tmp_path).keys() == {FIELD, WARPED, "results.json", "report.html"}
    withdraw(tmp_path, images=True)
    assert whole(tmp_path) == {}


def test_a_result_that_cannot_be_withdrawn_is_said(tmp_path, as_nobody):
    write_case(tmp_path / "out")
    for folder in (tmp_path, tmp_path / "out"):
        folder.chmod(0o555)
    with as_nobody(), pytest.raises(InputError, match=r"earlier result cannot be removed \(Permission denied\)"):
        withdraw(tmp_path / "out")


def test_only_own_parts_of_files_are_removed(tmp_path):
    names = (f".{'0a' * 16}.partial", ".notes.partial", f".{'0a' * 16}.partial.mha")
    touch(tmp_path, *names, *(f"images/warped-moving/{name}" for name in names))
    with sole_writer(tmp_path), sole_image(tmp_path / WARPED) as path:
        path.write_bytes(b"new")
    assert whole(tmp_path).keys() == {WARPED, *names[1:], *(f"images/warped-moving/{name}" for name in names[1:])}


def test_sole_image_replaces_those_of_earlier_runs(tmp_path):
    write_result(tmp_path, "images/warped-moving/old.mha")
    touch(tmp_path, "images/warped-moving/notes.txt")
    with sole_image(tmp_path / "images/warped-moving/new.mha") as path:
        assert (path.parent / "old.mha").exists()  # until the new one is there
        path.write_bytes(b"new")
    assert sorted(p.name for p in path.parent.iterdir()) == ["new.mha", "notes.txt"]
    assert path.read_bytes() == b"new"


def test_failure_leaves_no_empty_folders_and_keeps_old_images(tmp_path):
    def fail(path: Path) -> None:
        with sole_image(path):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail(tmp_path / "out/images/displacement-field/a.mha")
    assert not list(tmp_path.iterdir())
    touch(tmp_path, "out/images/displacement-field/old.mha")
    with pytest.raises(RuntimeError, match="no"):
        fail(tmp_path / "out/images/displacement-field/a.mha")
    with pytest.raises(RuntimeError, match="no"):
        fail(tmp_path / "out/images/warped-moving/a.mha")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "out/images/displacement-field/old.mha"]
    assert not (tmp_path / "out/images/warped-moving").exists()


def test_results_are_plain_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(
        path,
        {
            "nan": float("nan"),
            "nested": [{"inf": np.float32("inf")}, (1, 2.5, None, True)],
            "numpy": np.int64(3),
            "torch": torch.tensor(0.5),
            "text": "é→\udcff",
        },
    )
    assert json.loads(path.read_bytes()) == {
        "nan": None,
        "nested": [{"inf": None}, [1, 2.5, None, True]],
        "numpy": 3,
        "torch": 0.5,
        "text": "é→\udcff",
    }
    assert '"text": "é→' in path.read_text("utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("value", [Path("a"), np.zeros(2), torch.zeros(1), {1: 2}, {1, 2}, 1j])
def test_results_refuse_what_json_cannot_hold(tmp_path, value):
    touch(tmp_path, "results.json")
    with pytest.raises(TypeError, match="results hold"):
        write_results(tmp_path / "results.json", {"a": [value]})
    assert (tmp_path / "results.json").read_bytes() == b"x"


def test_field_layout():
    cli, gc = Inputs(Path("f"), Path("m")), Inputs(Path("f"), Path("m"), platform=True)
    assert [field_layout("auto", i) for i in (cli, gc)] == ["itk", "grand-challenge"]
    assert [field_layout("itk", i) for i in (cli, gc)] == ["itk", "itk"]
    assert [field_layout("grand-challenge", i) for i in (cli, gc)] == ["grand-challenge"] * 2
