"""TotalSegmentator's and lungmask's lobes in place of lung masks."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.errors import InputError
from algorithm.lungs.segmentations import lungs_of
from tests.support.running import call_main, field_array, pair_options

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("upper_lobe_left", "lower_lobe_left", "upper_lobe_right", "middle_lobe_right", "lower_lobe_right")


@pytest.fixture
def forms(tmp_path: Path, example: Path) -> dict[str, Path]:
    """The phantom's lobes as each program writes them, with other organs where they have any."""
    lobes = sitk.ReadImage(str(example / "fixed_lobes.mha"))
    labels = sitk.GetArrayFromImage(lobes).astype(np.uint8)
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 5}

    def write(name: str, values: np.ndarray) -> Path:
        image = sitk.GetImageFromArray(values.astype(np.uint8))
        image.CopyInformation(lobes)
        sitk.WriteImage(image, str(tmp_path / name))
        return tmp_path / name

    all_labels = np.where(labels > 0, labels + 9, 0)
    all_labels[:3] = 51  # heart
    all_labels[-3:] = 1  # spleen
    first_version = np.where(labels > 0, labels + 12, 0)
    first_version[:3] = np.resize([10, 11, 12, 0], labels[:3].shape)  # pancreas and adrenals
    all_labels[0, 0, :3] = [15, 16, 17]  # oesophagus, trachea, thyroid
    (tmp_path / "folder").mkdir()
    for number, name in enumerate(NAMES, start=1):
        write(f"folder/lung_{name}.nii.gz", labels == number)
    write("folder/heart.nii.gz", np.ones_like(labels))
    return {
        "lungmask": write("lobes.nii.gz", labels),
        "all": write("all.nii.gz", all_labels),
        "first version": write("first.nii.gz", first_version),
        "folder": tmp_path / "folder",
    }


@pytest.mark.parametrize("form", ["lungmask", "all", "first version", "folder"])
def test_lobes_are_found_whoever_wrote_them(forms: dict[str, Path], example: Path, form: str) -> None:
    mask, grid = lungs_of(forms[form])
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(example / "fixed_lobes.mha"))) > 0
    if form in ("all", "first version"):
        expected[:3] = False
    if form == "all":
        expected[-3:] = False
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(grid.origin, sitk.ReadImage(str(example / "fixed_lobes.mha")).GetOrigin(), atol=1e-4)


def test_what_holds_no_lobes_is_refused(tmp_path: Path, forms: dict[str, Path]) -> None:
    heart = forms["folder"] / "heart.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(heart)) * 51, str(tmp_path / "heart.nii.gz"))
    with pytest.raises(InputError, match=r"has the labels 51, expected lobes"):
        lungs_of(tmp_path / "heart.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no lung_"):
        lungs_of(tmp_path / "empty")
    turned = sitk.ReadImage(str(forms["folder"] / "lung_lower_lobe_left.nii.gz"))
    turned.SetOrigin((0.0, 0.0, 500.0))
    sitk.WriteImage(turned, str(forms["folder"] / "lung_lower_lobe_left.nii.gz"))
    with pytest.raises(InputError, match="another grid"):
        lungs_of(forms["folder"])


def test_the_command_takes_them_as_masks(
    tmp_path: Path, forms: dict[str, Path], example: Path, small_weights: Path
) -> None:
    fields = []
    for options in (["--fixed-lobes", forms["folder"]], ["--fixed-mask", forms["lungmask"]], []):
        out = tmp_path / f"out{len(fields)}"
        assert call_main(*pair_options(example, out, small_weights), *options) == 0
        fields.append(field_array(out))
    np.testing.assert_array_equal(fields[0], fields[1])
    assert np.abs(fields[0] - fields[2]).max() > 1e-3
