"""DICOM series written by SimpleITK, whole or with faults; other DICOM objects and enhanced CT written by pydicom."""

import locale
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

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


PIXELS = {
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
}


def dataset(**values: object) -> Dataset:
    """The elements of these names."""
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


def write_object(path: Path, kind: uid.UID, modality: str, **values: object) -> Path:
    """A DICOM object of a SOP class, in a series of its own unless ``values`` name another."""
    data = dataset(
        SOPClassUID=kind,
        SOPInstanceUID=uid.generate_uid(entropy_srcs=[path.name]),
        Modality=modality,
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID=uid.generate_uid(entropy_srcs=[modality]),
    )
    data.update(dataset(**values))
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def write_companions(folder: Path) -> None:
    """What exports of radiotherapy and of archives put beside the slices."""
    for name, kind, modality in (
        ("RS", uid.RTStructureSetStorage, "RTSTRUCT"),
        ("RP", uid.RTPlanStorage, "RTPLAN"),
        ("SR", uid.XRayRadiationDoseSRStorage, "SR"),
        ("PR", uid.GrayscaleSoftcopyPresentationStateStorage, "PR"),
        ("KO", uid.KeyObjectSelectionDocumentStorage, "KO"),
        ("REG", uid.SpatialRegistrationStorage, "REG"),
        ("DOC", uid.EncapsulatedPDFStorage, "DOC"),
        ("own", uid.UID("1.3.12.2.1107.5.9.1"), "CT"),
    ):
        write_object(folder / f"{name}.dcm", kind, modality)
    image = {**PIXELS, "Rows": 4, "Columns": 5, "PixelData": bytes(2 * 20)}
    dose = {**image, "NumberOfFrames": 3, "PixelData": bytes(2 * 60), "DoseGridScaling": "0.1"}
    write_object(folder / "RD.dcm", uid.RTDoseStorage, "RTDOSE", **dose, GridFrameOffsetVector=[0, 3, 6])
    write_object(folder / "PT.dcm", uid.PositronEmissionTomographyImageStorage, "PT", **image)
    write_object(folder / "screen.dcm", uid.SecondaryCaptureImageStorage, "CT", **image)
    scout = {**image, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesInstanceUID": "1.2.3.4"}
    write_object(folder / "scout.dcm", uid.CTImageStorage, "CT", **scout)


def write_enhanced(
    path: Path, image: sitk.Image, order: list[int], slopes: list[float], frames_with_places: int | None = None
) -> Path:
    """The slices ``order`` as the frames of one enhanced CT; rescaled by one slope for all, or by each its own."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    between_columns, between_rows, thickness = image.GetSpacing()
    rescale = [[dataset(RescaleSlope=slope, RescaleIntercept=-1024, RescaleType="HU")] for slope in slopes]
    places = [[float(v) for v in image.TransformIndexToPhysicalPoint((0, 0, z))] for z in order]
    groups = [
        dataset(
            PlanePositionSequence=[dataset(ImagePositionPatient=place)],
            FrameContentSequence=[dataset(FrameAcquisitionNumber=1)],
        )
        for place in places
    ]
    shared = dataset(
        PixelMeasuresSequence=[dataset(PixelSpacing=[between_rows, between_columns], SliceThickness=thickness)],
        PlaneOrientationSequence=[dataset(ImageOrientationPatient=[float(v) for v in direction[:, :2].T.ravel()])],
    )
    if len(slopes) == 1:
        shared.PixelValueTransformationSequence = rescale[0]
    else:
        for n, group in enumerate(groups):
            group.PixelValueTransformationSequence = rescale[n % len(rescale)]
    hu = sitk.GetArrayFromImage(image)[order]
    stored = (hu + 1024) / np.resize(slopes, len(order))[:, None, None]
    return write_object(
        path,
        uid.EnhancedCTImageStorage,
        "CT",
        **PIXELS,
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        Rows=image.GetHeight(),
        Columns=image.GetWidth(),
        NumberOfFrames=len(order),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups[:frames_with_places],
        PixelData=stored.round().astype("<i2").tobytes(),
    )


def write_two_acquisitions(folder: Path, one: sitk.Image, other: sitk.Image, numbers: tuple[str, str]) -> Path:
    """Two scans of one grid in one series, the slices of the other half a slice above those of the one."""
    write_series(folder, one, {"0020|0012": numbers[0]}, "one {}")
    half = np.array(one.GetDirection()).reshape(3, 3)[:, 2] * one.GetSpacing()[2] / 2
    return write_series(folder, other, {"0020|0012": numbers[1]}, "other {}", lambda z: (half[0], half[1], half[2]))
