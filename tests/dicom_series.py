"""DICOM series written by SimpleITK, whole or with faults."""

import locale
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

CT = {
    "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
    "0008|0060": "CT",
    "0008|103e": "chest",
    "0020|000d": "1.2.3",
    "0020|000e": "1.2.3.4",
    "0028|1052": "-1024",
    "0028|1053": "1",
}


def as_text(values: np.ndarray) -> str:
    return "\\".join(f"{v:.8g}" for v in values)


def write_slice(
    path: Path, image: sitk.Image, z: int, tags: dict[str, str], shift_mm: np.ndarray, compressor: str = ""
) -> None:
    direction = np.array(image.GetDirection()).reshape(3, 3)
    plane = image[:, :, z]
    position = np.array(image.TransformIndexToPhysicalPoint((0, 0, z))) + shift_mm
    geometry = {"0020|0032": as_text(position), "0020|0037": as_text(direction[:, :2].T.ravel())}
    for key, value in {**CT, **geometry, "0020|0013": str(z), **tags}.items():
        plane.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.SetUseCompression(bool(compressor))
    writer.SetCompressor(compressor)
    before = locale.setlocale(locale.LC_ALL)
    writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # GDCM's writer leaves "C" behind, its reader does not


def write_series(
    folder: Path,
    image: sitk.Image,
    tags: dict[str, str] | None = None,
    name: str = "{}.dcm",
    shift_mm: Callable[[int], tuple[float, float, float]] = lambda z: (0.0, 0.0, 0.0),
) -> Path:
    """One file per slice; the names say nothing of the order. ``shift_mm`` is added to each slice's position."""
    folder.mkdir(parents=True, exist_ok=True)
    for z in range(image.GetDepth()):
        path = folder / name.format(f"im{7 * z % 101:03}")
        write_slice(path, image, z, tags or {}, np.array(shift_mm(z)))
    return folder
