"""The platform's own reader of images takes what is written, and its rule for displacement fields holds."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from panimg import convert
from panimg.image_builders.metaio_mhd_mha import image_builder_mhd
from panimg_models import PanImg

from algorithm.files.images import Layout
from algorithm.files.writing import write_field, write_image
from algorithm.geometry import Grid

GRID = Grid((4, 5, 6), (0.7, 0.8, 2.5), (-120.0, 30.5, -400.0), ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0)))
COLOUR_COMPONENTS = {"GRAY": 1, "RGB": 3, "RGBA": 4, "YCBCR": 4}


def converted(folder: Path, kept: Path) -> PanImg:
    """The only image of a folder, as the platform imports it from an algorithm's output."""
    result = convert(input_directory=folder, output_directory=kept, builders=[image_builder_mhd], post_processors=[])
    assert result.file_errors == {}
    (image,) = result.new_images
    return image


def shape(image: PanImg) -> tuple[int, ...]:
    """As the platform reckons it: time, z, y, x, colour, those that there are."""
    colours = COLOUR_COMPONENTS[image.color_space.value]
    sizes = (image.timepoints, image.depth, image.height, image.width, colours if colours > 1 else None)
    return tuple(size for size in sizes if size is not None)


def is_displacement_field(image: PanImg) -> bool:
    """The rule for outputs of the kind "Displacement field": 4-D, without colours, three components in front."""
    return image.color_space.value == "GRAY" and len(shape(image)) == 4 and shape(image)[0] == 3


@pytest.mark.parametrize(("layout", "accepted"), [("grand-challenge", True), ("itk", False)])
def test_displacement_field(tmp_path: Path, layout: Layout, accepted: bool) -> None:
    """Vectors are three colours to the platform: with that layout, the rule refuses the field."""
    field = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, *GRID.shape)).astype(np.float32))
    (tmp_path / "output").mkdir()
    write_field(tmp_path / "output" / "field.mha", GRID, [field], layout)
    image = converted(tmp_path / "output", tmp_path / "kept")
    assert shape(image) == ((3, 6, 5, 4) if accepted else (6, 5, 4, 3))
    assert is_displacement_field(image) == accepted
    assert (image.voxel_width_mm, image.voxel_height_mm, image.voxel_depth_mm) == GRID.spacing

    (kept,) = (tmp_path / "kept").glob("*/*.mha")
    stored = sitk.ReadImage(str(kept))
    array = np.moveaxis(sitk.GetArrayFromImage(stored), 0 if accepted else -1, 0)
    np.testing.assert_array_equal(array, field[0].numpy())
    volume = stored[:, :, :, 0] if accepted else stored
    assert volume.GetOrigin() == GRID.origin
    assert volume.GetDirection() == tuple(np.ravel(GRID.direction))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_warped_image(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "output").mkdir()
    write_image(tmp_path / "output" / "warped.mha", torch.zeros(1, 1, *GRID.shape, dtype=dtype), GRID)
    image = converted(tmp_path / "output", tmp_path / "kept")
    assert shape(image) == GRID.shape
    assert not is_displacement_field(image)
