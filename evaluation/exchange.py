"""Displacement fields for programs that do not read ITK images of vectors: NIfTI's own vectors, and transformix."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.loadsave import save as save_nifti
from nibabel.nifti1 import Nifti1Image

from .fields import DISPVECT, SLAB, axes_of, write_itk

TO_RAS = np.diag([-1.0, -1.0, 1.0])


def write_nifti_vectors(field: sitk.Image, path: Path) -> None:
    """Write the field as NIfTI defines displacements: five axes, intent 1006, mm along RAS. It is for nitransforms, FSL
    and other readers that follow the standard; vectors of ITK and ANTs are in LPS (`write_itk`)."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TO_RAS @ axes_of(field), TO_RAS @ field.GetOrigin()
    lps = sitk.GetArrayViewFromImage(field)
    ras = np.empty((*field.GetSize(), 1, 3), np.float32)
    for z in range(0, len(lps), SLAB):
        ras[:, :, z : z + SLAB, 0] = lps[z : z + SLAB].transpose(2, 1, 0, 3) @ TO_RAS.astype(np.float32)
    image = Nifti1Image(ras, affine)
    image.header.set_intent(DISPVECT)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    save_nifti(image, path)


def write_transformix(field: sitk.Image, path: Path, to: Path) -> None:
    """Write a parameter file for elastix that names the field, ``<name>_field.mha`` beside it. It resamples the moving
    image onto the grid of the field. ``to``: the final folder of both files."""
    name = f"{path.stem}_field.mha"
    write_itk(field, path.with_name(name))
    direction = np.array(field.GetDirection()).reshape(3, 3)
    lines = {
        "Transform": '"DeformationFieldTransform"',
        "DeformationFieldFileName": f'"{to.absolute() / name}"',
        "DeformationFieldInterpolationOrder": "1",
        "NumberOfParameters": "0",
        "InitialTransformParameterFileName": '"NoInitialTransform"',
        "HowToCombineTransforms": '"Compose"',
        "FixedImageDimension": "3",
        "MovingImageDimension": "3",
        "FixedInternalImagePixelType": '"float"',
        "MovingInternalImagePixelType": '"float"',
        "Size": _listed(field.GetSize()),
        "Index": "0 0 0",
        "Spacing": _listed(field.GetSpacing()),
        "Origin": _listed(field.GetOrigin()),
        "Direction": _listed(direction.T.ravel()),  # column by column
        "UseDirectionCosines": '"true"',
        "Resampler": '"DefaultResampler"',
        "ResampleInterpolator": '"FinalLinearInterpolator"',
        "DefaultPixelValue": "-1000",
        "ResultImageFormat": '"mha"',
        "ResultImagePixelType": '"float"',
        "CompressResultImage": '"false"',
    }
    path.write_text("".join(f"({key} {value})\n" for key, value in lines.items()))


def _listed(numbers: object) -> str:
    return " ".join(repr(value) for value in np.asarray(numbers).tolist())
