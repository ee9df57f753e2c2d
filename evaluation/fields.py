"""Reads displacement fields from files, and writes them in the formats of the challenges.

In memory, a field is a 3-D `sitk.Image` of three float32 components: u in mm along the world axes (LPS), on a grid
in fixed world coordinates; x_moving = x_fixed + u(x_fixed). The files:

===================================  ==================================================================================
``.mha .mhd .nrrd``                  u itself: 3-D with three components (ITK), or 4-D scalar with 3 as the last size
                                     (grand-challenge)
``.nii .nii.gz``                     [x y z 1 3] or [x y z 3]; the header says LPS or RAS, see
                                     `_nifti_signs`
``disp_*.nii.gz``, ``.npz``          Learn2Reg: (X, Y, Z, 3) or (3, X, Y, Z), components along the index axes in voxels:
                                     index_moving = index_fixed + v; the file has no grids. ``.npz`` also at
                                     half resolution: (3, X/2, Y/2, Z/2), still in voxels of the full one
``.h5 .hdf5 .tfm``                   ITK's transforms: a displacement field with its own grid, or a composite of fields
                                     and affine parts, which is sampled on the fixed grid
folder of ``defX defY defZ .mhd``    EMPIRE10: one scalar image per component, mm along the axes of the fixed image
===================================  ==================================================================================
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Shaped
from nibabel.filebasedimages import ImageFileError
from nibabel.loadsave import load as load_nifti
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import zoom

from .errors import CaseError, short
from .images import ENDINGS, Grid, open_image, place, read_image, read_voxels

EMPIRE10 = ("defX.mhd", "defY.mhd", "defZ.mhd")
TRANSFORMS = (".h5", ".hdf5", ".tfm")
"""Endings of ITK's transform files."""
DISPVECT, VECTOR = 1006, 1007
"""The intents of NIfTI for "displacement vectors" and "vectors"."""
MM_AND_SECONDS = 10
"""The value that ITK writes into NIfTI's xyzt_units."""
MOST_MM = 10_000.0
"""Maximum length of a displacement: a longer one cannot be the motion of a chest in mm, and its determinant may exceed
the range of float32."""
SLAB = 8
"""Number of slices that are processed at a time: some tens of MB at 512 × 512."""

Matrix = Float[np.ndarray, "3 3"]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_field(path: Path, fixed: Grid | None = None, moving: Grid | None = None) -> sitk.Image:
    """The displacement field (mm, LPS) of a file, or of an EMPIRE10 folder.

    Learn2Reg files need ``fixed``, the fixed grid; ``moving`` is the moving grid, by default the same. An EMPIRE10
    field lies on ``fixed`` if given, else on the grid of its headers. Transforms that are more than a field are sampled
    on ``fixed``, or else on the grid of their last field. Other files have their own grid, which may differ from the
    fixed one. CaseError if the file is missing, damaged, or of another kind, does not define its vectors, or holds
    values that are not finite or exceed `MOST_MM`.
    """
    try:
        if path.is_dir() or path.name in EMPIRE10:
            field = _read_empire10(path if path.is_dir() else path.parent, fixed)
        elif is_learn2reg(path):
            field = _read_learn2reg(path, fixed, fixed if moving is None else moving)
        elif is_transform(path):
            field = _read_transform(path, fixed)
        else:
            field = _read_itk(path)
    except CaseError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, ImageFileError, HeaderDataError) as error:
        raise CaseError(f"{path.name}: cannot be read ({error}), expected a whole file") from error
    except RuntimeError as error:  # SimpleITK
        raise CaseError(f"{path.name}: cannot be read, expected a whole displacement field") from error
    _check_values(path, sitk.GetArrayViewFromImage(field))
    return field


def is_learn2reg(path: Path) -> bool:
    """Whether the name is one of Learn2Reg's: disp_….nii.gz, or any .npz."""
    return path.name.endswith(".npz") or (path.name.startswith("disp_") and path.name.endswith(".nii.gz"))


def is_transform(path: Path) -> bool:
    """Whether the name is that of an ITK transform."""
    return path.name.endswith(TRANSFORMS)


def axes_of(image: Grid) -> Matrix:
    """World mm per index step, direction · diag(spacing): the columns are the steps along x, y and z."""
    axes: Matrix = _direction(image) * image.GetSpacing()
    return axes


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two 3-D images have the same voxel positions, up to a thousandth of a voxel everywhere."""
    last = np.array([*a.GetSize()]) - 1
    corners = np.array(list(np.ndindex(2, 2, 2))) * last
    shift = np.array(a.GetOrigin()) - b.GetOrigin() + corners @ (axes_of(a) - axes_of(b)).T
    near = float(np.abs(shift).max()) <= 1e-3 * min(a.GetSpacing())
    return near and tuple(a.GetSize()) == tuple(b.GetSize())


def _read_itk(path: Path) -> sitk.Image:
    """Read vectors, or scalars with a fourth axis. The latter are read component by component, which halves the
    memory."""
    reader = _open(path)
    if _is_nifti(path):
        return _read_nifti(path, reader)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) == 3 and components == 3:
        return _image(np.asarray(read_voxels(path, reader), np.float32), reader)
    if len(size) != 4 or size[3] != 3 or components != 1:
        raise CaseError(
            f"{path.name}: has size {size} and {components} component(s), "
            "expected a displacement field: 3-D with 3 components, or 4-D with 3 as the last size"
        )
    voxels = read_voxels(path, reader)
    images = [sitk.GetImageFromArray(np.asarray(scalars, np.float32)) for scalars in voxels]
    del voxels
    field: sitk.Image = sitk.Compose(images)
    place(field, reader)
    return field


def _read_nifti(path: Path, reader: sitk.ImageFileReader) -> sitk.Image:
    """Read a NIfTI field with signs from the header, all of which nibabel reads. `read_voxels` has already turned
    vectors with intent 1006."""
    header = load_nifti(path).header
    assert isinstance(header, Nifti1Header)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if (size[3:], components) not in (((3,), 1), ((1, 3), 1), ((), 3), ((1,), 3)):
        raise CaseError(
            f"{path.name}: has size {size} and {components} component(s), expected a displacement field: [x y z 3] or "
            "[x y z 1 3]"
        )
    signs = _nifti_signs(path, header, len(size) if components == 1 else 5)
    if components == 3 and int(header["intent_code"]) == DISPVECT:
        signs = np.ones(3, np.float32)
    values = read_voxels(path, reader)
    if components == 1:
        values = np.moveaxis(values, 0, -1)
    return _image(np.multiply(values, signs, dtype=np.float32).reshape(*size[2::-1], 3), reader)


def _nifti_signs(path: Path, header: Nifti1Header, axes: int) -> Float[np.ndarray, " 3"]:
    """The factors that turn the stored components to LPS; CaseError if the header does not define them.

    RAS mm: intent 1006 (DISPVECT), as NIfTI defines it; intent 1007 (VECTOR) in four axes, which ITK does not write;
    NiftyReg's displacements. LPS mm: intent 1007 in five axes from ITK, ANTs or greedy, which also write qform_code 1
    and units of mm and s; software that uses NIfTI's own world coordinates does not write these values by default.
    """
    intent, name = int(header["intent_code"]), header["intent_name"].item().decode("latin-1").strip("\0 ")
    by_itk = int(header["qform_code"]) == 1 and int(header["xyzt_units"]) == MM_AND_SECONDS
    ras, lps = np.array([-1, -1, 1], np.float32), np.ones(3, np.float32)
    if name == "NREG_TRANS":
        if int(header["intent_p1"]) == 1:
            return ras
        raise CaseError(f"{path.name}: is NiftyReg's transform of kind {header['intent_p1']:g}, expected displacements")
    if intent == DISPVECT or (intent == VECTOR and axes == 4):
        return ras
    if intent == VECTOR and by_itk:
        return lps
    raise CaseError(
        f"{path.name}: its header (intent {intent}) does not say whether its vectors are RAS or LPS, mm or voxels, "
        f"expected intent {DISPVECT} for RAS in mm, ITK's own header for LPS, or for voxels a name disp_….nii.gz"
    )


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def _read_transform(path: Path, fixed: Grid | None) -> sitk.Image:
    """A single field is used unchanged; any other transform is sampled, outside its fields as ITK does."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # SimpleITK would end the process
        raise CaseError(f"{short(path)}: its path is not in UTF-8, expected one that is") from error
    transform = sitk.ReadTransform(str(path))
    if transform.GetDimension() != 3:
        raise CaseError(f"{path.name}: is a transform in {transform.GetDimension()} dimensions, expected three")
    parts = filter(_is_field, _parts(transform))
    fields = [sitk.DisplacementFieldTransform(part).GetDisplacementField() for part in parts]
    if any(0 in field.GetSize() for field in fields):
        raise CaseError(f"{path.name}: holds a displacement field without voxels, expected a whole file")
    if _is_field(transform):
        lone: sitk.Image = sitk.Cast(fields[0], sitk.sitkVectorFloat32)
        return lone
    grid = fields[-1] if fixed is None and fields else fixed
    if grid is None:
        raise CaseError(f"{path.name}: is a {transform.GetName()}, expected an image on the fixed grid beside it")
    sampled: sitk.Image = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat32, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
    return sampled


def _is_field(transform: sitk.Transform) -> bool:
    return bool(transform.GetTransformEnum() == sitk.sitkDisplacementField)


def _parts(transform: sitk.Transform) -> list[sitk.Transform]:
    """The transforms in a composite and in nested composites, in reverse order of application; or the only
    transform."""
    if transform.GetTransformEnum() != sitk.sitkComposite:
        return [transform]
    composite = sitk.CompositeTransform(transform)
    parts = (composite.GetNthTransform(n) for n in range(composite.GetNumberOfTransforms()))
    return [inner for part in parts for inner in _parts(part)]


def _open(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header."""
    if not path.name.endswith(ENDINGS):
        known = ", ".join((*ENDINGS, *TRANSFORMS))
        raise CaseError(f"{path.name}: is no known kind of field, expected a name that ends in {known}")
    return open_image(path)


def _read_learn2reg(path: Path, fixed: Grid | None, moving: Grid | None) -> sitk.Image:
    if fixed is None or moving is None:
        raise CaseError(f"{path.name}: is a Learn2Reg field, in voxels, expected an image on the fixed grid beside it")
    size = fixed.GetSize()
    stored = _only_array(path, size) if path.name.endswith(".npz") else _four_axes_array(path)
    _check_shape(path, stored.shape, stored.dtype, size)
    if stored.shape == _half(size):
        stored = np.stack([zoom(component.astype(np.float32), 2, order=2) for component in stored])
    voxels = stored if stored.shape == (*size, 3) else np.moveaxis(stored, 0, -1)
    field = np.empty((*size[::-1], 3), np.float32)
    to_fixed, offset = _index_change(fixed, moving)
    for z in range(0, len(field), SLAB):
        slab = voxels[:, :, z : z + SLAB].transpose(2, 1, 0, 3).astype(float)
        field[z : z + SLAB] = slab @ axes_of(moving).T + _linear(to_fixed, offset, slab.shape[:3], z)
    return _image(field, fixed)


def _four_axes_array(path: Path) -> Shaped[np.ndarray, "a b c d"]:
    """The array as nibabel reads it; vectors are rejected, because their sign depends on the intent in the header."""
    reader = _open(path)
    intent = reader.GetMetaData("intent_code")
    if intent in (str(DISPVECT), str(VECTOR)):
        raise CaseError(
            f"{path.name}: its name says voxels and its header (intent {intent}) vectors in mm, expected intent 0 for "
            "voxels, or a name without disp_ for mm"
        )
    if reader.GetDimension() != 4 or reader.GetNumberOfComponents() != 1:
        raise CaseError(
            f"{path.name}: has size {reader.GetSize()} and {reader.GetNumberOfComponents()} component(s), "
            "expected the four axes of a Learn2Reg field"
        )
    array: np.ndarray = read_voxels(path, reader).T
    return array


def npz_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the only array in a .npz file, without its values. ValueError if it is not an array."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise CaseError(f"{path.name}: holds the arrays {names}, expected one")
        with archive.open(names[0]) as file:
            first = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    return shape, dtype


def _only_array(path: Path, size: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
    """The only array of the file; its shape is checked before its values are read."""
    _check_shape(path, *npz_header(path), size)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        array: np.ndarray = arrays[arrays.files[0]]
    return array


def _half(size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of Learn2Reg's arrays at half the resolution; None if it cannot be halved.

    The evaluation of Learn2Reg enlarges them with `scipy.ndimage.zoom` of second order, corner to corner. It keeps the
    values, because they are in voxels of the full resolution.
    """
    return None if any(n % 2 for n in size) else (3, *(n // 2 for n in size))


def _check_shape(path: Path, shape: tuple[int, ...], dtype: np.dtype, size: tuple[int, ...]) -> None:
    half = _half(size) if path.name.endswith(".npz") else None
    if dtype.kind not in "fiu" or shape not in ((*size, 3), (3, *size), half):
        raise CaseError(
            f"{path.name}: is an array of {shape} {dtype}, expected numbers of {(*size, 3)} or {(3, *size)}, "
            f"a vector for each voxel of the fixed image{f', or {half} for every second one' if half else ''}"
        )


def _read_empire10(folder: Path, fixed: Grid | None) -> sitk.Image:
    missing = [name for name in EMPIRE10 if not (folder / name).exists()]
    if missing:
        raise CaseError(f"{folder.name}: has no {', '.join(missing)}, expected {', '.join(EMPIRE10)}")
    images = [sitk.Cast(read_image(folder / name), sitk.sitkFloat32) for name in EMPIRE10]
    grid = images[0] if fixed is None else fixed
    for name, image in zip(EMPIRE10, images, strict=True):
        if image.GetSize() != grid.GetSize() or not np.allclose(image.GetSpacing(), grid.GetSpacing(), rtol=1e-3):
            raise CaseError(
                f"{folder.name}/{name}: has size {image.GetSize()} and spacing {image.GetSpacing()}, "
                f"expected {grid.GetSize()} and {grid.GetSpacing()}"
            )
        place(image, grid)
    return _mapped(sitk.Compose(images), _direction(grid))


def _check_values(path: Path, field: Float[np.ndarray, "z y x 3"]) -> None:
    for z in range(0, len(field), SLAB):
        low, high = float(field[z : z + SLAB].min()), float(field[z : z + SLAB].max())
        if not (low >= -MOST_MM and high <= MOST_MM):  # also for NaN
            raise CaseError(
                f"{path.name}: holds displacements from {low:g} to {high:g} mm, "
                f"expected finite ones of at most {MOST_MM:g} mm"
            )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_itk(field: sitk.Image, path: Path) -> None:
    """Write a 3-D image of vectors, which ITK, ANTs, elastix and 3D Slicer read."""
    sitk.WriteImage(field, str(path))


def write_transform(field: sitk.Image, path: Path) -> None:
    """Write ITK's DisplacementFieldTransform in .h5, .hdf5 or .tfm, in double precision; 3D Slicer, ANTs and elastix
    read it."""
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    sitk.WriteTransform(transform, str(path))


def write_grand_challenge(field: sitk.Image, path: Path) -> None:
    """Write a 4-D scalar image whose last axis is the component: the platform's kind "Displacement field"."""
    sitk.WriteImage(_four_axes(field), str(path))


def write_learn2reg(field: sitk.Image, path: Path, moving: Grid | None = None, channels_first: bool = False) -> None:
    """Write Learn2Reg's disp_*.nii.gz or .npz: float32 (X, Y, Z, 3), or (3, X, Y, Z), in voxels along the index axes.

    v = index_moving(x + u) - index_fixed(x); ``moving`` is an image on the moving grid, by default that of the field.
    The field must lie on the grid of the fixed image.
    """
    grid = field if moving is None else moving
    matrix = np.linalg.inv(axes_of(grid))
    to_fixed, offset = _index_change(field, grid)
    mm = sitk.GetArrayViewFromImage(field)
    voxels = np.empty(mm.shape, np.float32)
    for z in range(0, len(mm), SLAB):
        slab = mm[z : z + SLAB].astype(float) - _linear(to_fixed, offset, mm[z : z + SLAB].shape[:3], z)
        voxels[z : z + SLAB] = slab @ matrix.T
    if path.name.endswith(".npz"):
        array = voxels.transpose(2, 1, 0, 3)
        np.savez_compressed(path, np.moveaxis(array, -1, 0) if channels_first else array)
    elif channels_first:
        sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=False), str(path))
    else:
        sitk.WriteImage(_four_axes(_image(voxels, field)), str(path))


def write_empire10(field: sitk.Image, folder: Path) -> None:
    """Write EMPIRE10's defX, defY and defZ .mhd: mm along the axes of the fixed image, origin 0, identity direction."""
    folder.mkdir(parents=True, exist_ok=True)
    along_axes = _mapped(field, _direction(field).T)
    for component, name in enumerate(EMPIRE10):
        image = sitk.VectorIndexSelectionCast(along_axes, component)
        image.SetOrigin((0.0, 0.0, 0.0))
        image.SetDirection(np.eye(3).ravel())
        sitk.WriteImage(image, str(folder / name))


# --- shared ----------------------------------------------------------------------------------------------------------


def _direction(image: Grid) -> Matrix:
    return np.array(image.GetDirection()).reshape(3, 3)


def _index_change(fixed: Grid, moving: Grid) -> tuple[Matrix, Float[np.ndarray, " 3"]]:
    """(M, t) such that M i + t = x_moving(i) - x_fixed(i), the world positions (mm) of index i on the two grids."""
    offset: np.ndarray = np.array(moving.GetOrigin()) - fixed.GetOrigin()
    return axes_of(moving) - axes_of(fixed), offset


def _linear(
    matrix: Matrix, offset: Float[np.ndarray, " 3"], shape: tuple[int, ...], start: int
) -> Float[np.ndarray, "z y x 3"]:
    """matrix · (i, j, k) + offset for a slab of (z, y, x) voxels that starts at k = start."""
    nz, ny, nx = shape
    i, j, k = np.arange(nx), np.arange(ny), np.arange(start, start + nz)
    plane = i[:, None] * matrix[:, 0] + j[:, None, None] * matrix[:, 1] + offset
    sum_: np.ndarray = plane + k[:, None, None, None] * matrix[:, 2]
    return sum_


def _mapped(field: sitk.Image, matrix: Matrix) -> sitk.Image:
    """Each vector multiplied by a matrix."""
    if np.array_equal(matrix, np.eye(3)):
        return field
    vectors = sitk.GetArrayFromImage(field)
    for z in range(0, len(vectors), SLAB):
        vectors[z : z + SLAB] = vectors[z : z + SLAB].astype(float) @ matrix.T
    return _image(vectors, field)


def _image(vectors: Float[np.ndarray, "z y x 3"], grid: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(vectors, isVector=True)
    place(image, grid)
    return image


def _four_axes(field: sitk.Image) -> sitk.Image:
    joined: sitk.Image = sitk.JoinSeries([sitk.VectorIndexSelectionCast(field, c) for c in range(3)], 0.0, 1.0)
    return joined
