"""The ground truth of one case, a folder. All files are optional but the landmarks or the lobes.

==========================================  =============================================================
``fixed_landmarks.csv moving_landmarks.csv``  x, y, z in mm (LPS), a header line; row i of both is one landmark
``fixed_lobes.mha moving_lobes.mha``          whole numbers, 0 is background; each image on its own grid
``fixed_lung_mask.mha``                       where folding is counted; without it, ``fixed_lobes`` above 0
``case.json``                                 the images' names on grand-challenge.org, see `cases.py`
==========================================  =============================================================
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, UInt8, UInt16

from evaluation.errors import CaseError
from evaluation.fields import same_grid
from evaluation.landmarks import read_landmarks

ENDINGS = (".mha", ".mhd", ".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class GroundTruth:
    """What there is of a case: landmarks, labels, or both."""

    fixed_landmarks_mm: Float[np.ndarray, "n 3"] | None
    moving_landmarks_mm: Float[np.ndarray, "m 3"] | None
    fixed_labels: sitk.Image | None
    moving_labels: sitk.Image | None
    lung_mask: sitk.Image | None

    @property
    def grid(self) -> sitk.Image | None:
        """An image on the fixed grid, for fields in files that do not say where they lie."""
        return self.lung_mask if self.fixed_labels is None else self.fixed_labels


def read_ground_truth(folder: Path) -> GroundTruth:
    """The files of one case. CaseError when one is broken, or one of a pair missing, or both pairs."""
    fixed_csv, moving_csv = _pair(folder / "fixed_landmarks.csv", folder / "moving_landmarks.csv")
    fixed_file, moving_file = _pair(_image(folder, "fixed_lobes"), _image(folder, "moving_lobes"))
    mask_file = _image(folder, "fixed_lung_mask")
    if not fixed_csv and not fixed_file:
        raise CaseError(f"{folder.name} has neither landmarks (fixed_landmarks.csv) nor lobes (fixed_lobes.mha)")
    truth = GroundTruth(
        read_landmarks(fixed_csv) if fixed_csv else None,
        read_landmarks(moving_csv) if moving_csv else None,
        read_labels(fixed_file) if fixed_file else None,
        read_labels(moving_file) if moving_file else None,
        read_labels(mask_file) if mask_file.exists() else None,
    )
    if truth.fixed_landmarks_mm is not None and truth.moving_landmarks_mm is not None:
        counts = len(truth.fixed_landmarks_mm), len(truth.moving_landmarks_mm)
        if counts[0] != counts[1] or not counts[0]:
            raise CaseError(f"{folder.name} has {counts[0]} fixed and {counts[1]} moving landmarks, expected as many")
    return truth


def _image(folder: Path, name: str) -> Path:
    """``folder/name`` with the ending that is there, .mha when none is."""
    candidates = [folder / (name + ending) for ending in ENDINGS]
    return next((p for p in candidates if p.exists()), candidates[0])


def _pair(fixed: Path, moving: Path) -> tuple[Path | None, Path | None]:
    """Both files, or None twice; CaseError when only one is there."""
    missing = [p for p in (fixed, moving) if not p.exists()]
    if len(missing) == 1:
        name = f"{missing[0].parent.name}/{missing[0].name}"
        raise CaseError(f"{name} is missing, expected both {fixed.name} and {moving.name}")
    return (None, None) if missing else (fixed, moving)


def read_labels(path: Path) -> sitk.Image:
    """A 3-D image of whole numbers from 0 to 65535, as UInt8 or UInt16. CaseError when it is another, or broken."""
    name = f"{path.parent.name}/{path.name}"
    try:
        image: sitk.Image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise CaseError(f"{name} cannot be read as an image") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise CaseError(f"{name} has the size {image.GetSize()}, expected a 3-D image of labels")
    if image.GetPixelID() in (sitk.sitkUInt8, sitk.sitkUInt16):
        return image
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = voxels.min(), voxels.max()
    whole = voxels.dtype.kind in "iu" or all(np.array_equal(slab, np.rint(slab)) for slab in voxels)
    if not (whole and low >= 0 and high <= 65535):
        raise CaseError(f"{name} holds values from {low} to {high}, expected whole numbers from 0 to 65535")
    cast: sitk.Image = sitk.Cast(image, sitk.sitkUInt8 if high <= 255 else sitk.sitkUInt16)
    return cast


def labels_in(voxels: UInt8[np.ndarray, "z y x"] | UInt16[np.ndarray, "z y x"]) -> list[int]:
    """The labels but 0, in order."""
    counts = reduce(np.add, (np.bincount(slab.ravel(), minlength=65536) for slab in voxels))
    return [int(label) for label in np.flatnonzero(counts) if label]


def mask_on(field: sitk.Image, mask: sitk.Image) -> Bool[np.ndarray, "z y x"]:
    """Where ``mask`` is above 0, by nearest neighbour on the grid of ``field``. CaseError when that is nowhere."""
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
