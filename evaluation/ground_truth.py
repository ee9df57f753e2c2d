"""The ground truth of one case is a folder. All files are optional, but at least one must exist (not only
``case.json``); without landmarks and lobes, only the field itself is measured and shown.

==========================================  =============================================================
``fixed_landmarks.csv moving_landmarks.csv``  x, y, z in mm (LPS), a header line; row i of both is one landmark;
                                              or ``.fcsv`` or ``.mrk.json`` of 3D Slicer, which name LPS or RAS
``fixed_lobes.mha moving_lobes.mha``          whole numbers, 0 is background; each image on its own grid
``fixed_lung_mask.mha``                       the region for folding; without it, ``fixed_lobes`` above 0
``fixed.mha moving.mha``                      the scans, for pictures; without lobes also for their grids
``case.json``                                 the images' names on grand-challenge.org, see `cases.py`
==========================================  =============================================================
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, UInt8, UInt16

from .errors import CaseError, short
from .fields import same_grid
from .images import Grid, find_image, is_there, read_grid, read_image
from .landmarks import find_landmarks, read_landmarks


@dataclass(frozen=True)
class GroundTruth:
    """The ground truth of a case: landmarks, labels, both, or only images on which a field is shown."""

    fixed_landmarks_mm: Float[np.ndarray, "n 3"] | None
    moving_landmarks_mm: Float[np.ndarray, "m 3"] | None
    fixed_labels: sitk.Image | None
    moving_labels: sitk.Image | None
    lung_mask: sitk.Image | None
    fixed_grid: Grid | None
    """The grid of the fixed image, for field files without a grid: from its labels, else its mask, else the scan; None
    if there is none of them."""
    moving_grid: Grid | None
    """The grid of the moving image: from its labels, else the scan, else ``fixed_grid``."""
    labels: list[int]
    """Labels that both label images have."""
    lone_labels: list[tuple[int, str]]
    """Labels that only one image has, as after a lobectomy, with the name of this image."""
    moving_scan_known: bool
    """Whether `moving_grid` is the moving image's own grid."""

    @property
    def lungs(self) -> sitk.Image | None:
        """The region for folding (above 0): the lung mask, or else the fixed labels."""
        return self.fixed_labels if self.lung_mask is None else self.lung_mask


def read_ground_truth(folder: Path) -> GroundTruth:
    """The files of one case. CaseError if a file is broken, if one file of a pair is missing, or if all files are
    missing."""
    fixed_points, moving_points = _pair(*(find_landmarks(folder, role) for role in ("fixed", "moving")))
    fixed_file, moving_file = _pair(*(_image(folder, name) for name in ("fixed_lobes", "moving_lobes")))
    mask_file = find_image(folder, "fixed_lung_mask")
    if not (fixed_points or fixed_file or mask_file or find_image(folder, "fixed")):
        raise CaseError(
            f"{folder.name} has neither landmarks (fixed_landmarks.csv) nor lobes (fixed_lobes.mha), a lung mask "
            "(fixed_lung_mask.mha) or the fixed scan (fixed.mha), expected one of them"
        )
    fixed_labels, moving_labels, lung_mask = (
        None if file is None else read_labels(file) for file in (fixed_file, moving_file, mask_file)
    )
    fixed_grid = _grid(folder, "fixed", fixed_labels, lung_mask)
    moving_grid = _grid(folder, "moving", moving_labels)
    labels, lone_labels = _labels(fixed_labels, moving_labels)
    return GroundTruth(
        read_landmarks(fixed_points) if fixed_points else None,
        read_landmarks(moving_points) if moving_points else None,
        fixed_labels,
        moving_labels,
        lung_mask,
        fixed_grid,
        fixed_grid if moving_grid is None else moving_grid,
        labels,
        lone_labels,
        moving_grid is not None,
    )


def check_ground_truth(truth: GroundTruth) -> None:
    """CaseError if the numbers of landmarks differ, no label is in both label images, or the lung mask is empty."""
    fixed_mm, moving_mm = truth.fixed_landmarks_mm, truth.moving_landmarks_mm
    if fixed_mm is not None and moving_mm is not None and len(fixed_mm) != len(moving_mm):
        raise CaseError(f"{len(fixed_mm)} fixed and {len(moving_mm)} moving landmarks, expected as many")
    if truth.fixed_labels is not None and not truth.labels:
        raise CaseError(f"the only labels are {_listed(truth.lone_labels)}, expected at least one in both")
    if truth.lung_mask is not None and not sitk.GetArrayViewFromImage(truth.lung_mask).any():
        raise CaseError("the lung mask is empty, expected some voxels above 0")


def _listed(lone: list[tuple[int, str]]) -> str:
    found = {where: [label for label, image in lone if image == where] for where in ("fixed_lobes", "moving_lobes")}
    return " and ".join(f"{labels} in {where}" for where, labels in found.items())


def _labels(fixed: sitk.Image | None, moving: sitk.Image | None) -> tuple[list[int], list[tuple[int, str]]]:
    """The labels of both images, and the labels of only one image with its name."""
    if fixed is None or moving is None:
        return [], []
    of_fixed, of_moving = (labels_in(sitk.GetArrayViewFromImage(image)) for image in (fixed, moving))
    both = [label for label in of_fixed if label in of_moving]
    lone = [(label, "fixed_lobes") for label in of_fixed if label not in both]
    return both, sorted([*lone, *((label, "moving_lobes") for label in of_moving if label not in both)])


def _grid(folder: Path, scan: str, *images: sitk.Image | None) -> Grid | None:
    """The grid of the first existing image, else of ``folder/scan``; None if there is none."""
    known = [image for image in images if image is not None]
    file = None if known else find_image(folder, scan)
    return known[0] if known else None if file is None else read_grid(file)


def _image(folder: Path, name: str) -> Path:
    return find_image(folder, name) or folder / f"{name}.mha"


def _pair(fixed: Path, moving: Path) -> tuple[Path | None, Path | None]:
    """Both files, or None twice; CaseError if only one exists."""
    missing = [p for p in (fixed, moving) if not is_there(p)]
    if len(missing) == 1:
        raise CaseError(f"{short(missing[0])} is missing, expected both {fixed.name} and {moving.name}")
    return (None, None) if missing else (fixed, moving)


def read_labels(path: Path) -> sitk.Image:
    """A 3-D image of whole numbers from 0 to 65535, as UInt8 or UInt16. CaseError if the image is different or
    broken."""
    image = read_image(path)
    if image.GetPixelID() in (sitk.sitkUInt8, sitk.sitkUInt16):
        return image
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = voxels.min(), voxels.max()
    whole = voxels.dtype.kind in "iu" or all(np.array_equal(slab, np.rint(slab)) for slab in voxels)
    if not (whole and low >= 0 and high <= 65535):
        raise CaseError(f"{short(path)} holds values from {low} to {high}, expected whole numbers from 0 to 65535")
    cast: sitk.Image = sitk.Cast(image, sitk.sitkUInt8 if high <= 255 else sitk.sitkUInt16)
    return cast


def labels_in(voxels: UInt8[np.ndarray, "z y x"] | UInt16[np.ndarray, "z y x"]) -> list[int]:
    """The labels except 0, in order."""
    counts = reduce(np.add, (np.bincount(slab.ravel(), minlength=65536) for slab in voxels))
    return [int(label) for label in np.flatnonzero(counts) if label]


def mask_on(field: sitk.Image, mask: sitk.Image) -> Bool[np.ndarray, "z y x"]:
    """Where ``mask`` is above 0, by nearest neighbour on the grid of ``field``. CaseError if no voxel is."""
    if not same_grid(field, mask):
        mask = sitk.Resample(
            mask,
            field.GetSize(),
            sitk.Transform(3, sitk.sitkIdentity),
            sitk.sitkNearestNeighbor,
            field.GetOrigin(),
            field.GetSpacing(),
            field.GetDirection(),
        )
    inside: Bool[np.ndarray, "z y x"] = sitk.GetArrayViewFromImage(mask) > 0
    if not inside.any():
        raise CaseError("the lung mask is empty on the grid of the displacement field")
    return inside
