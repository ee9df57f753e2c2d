"""Displacement fields for programs that take no ITK image of vectors: NIfTI's own vectors, and transformix."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.loadsave import save as save_nifti
from nibabel.nifti1 import Nifti1Image

from .fields import DISPVECT, SLAB, axes_of, write_itk

TO_RAS = np.diag([-1.0, -1.0, 1.0])


def write_nifti_vectors(field: sitk.Image, path: Path) -> None:
    """As NIfTI defines displacements: five axes, intent 1006, mm along RAS. For nitransforms, FSL's and other readers
    that keep to the standard; ITK and ANTs mean LPS by their vectors (`write_itk`)."""
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
    """A parameter file of elastix that names the field, ``<name>_field.mha`` beside it; the moving image is resampled
    onto the field's grid. ``to``: where both come to lie in the end."""
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
