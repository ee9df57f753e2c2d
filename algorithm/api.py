"""The registration for Python programs: `register`, `Registrar`, `Registration`, `load`; the same as the command.

import lungreg

registration = lungreg.register("inspiration.nii.gz", "expiration.nii.gz")
registration.to_fixed([[10.0, -20.0, 35.0]])    # a point of the moving scan (mm, LPS) in the fixed one
registration.warp(lobes, labels=True)           # an image of the moving scan, on the grid of the fixed one
registration.save("result")
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float

from .cascade.weights import find_weights, load_cascade
from .deliver import deliver, unfolded
from .devices import choose_device
from .errors import InputError
from .fields.expected_error import ExpectedError
from .fields.frame import framed
from .fields.inverse import Inverse, inverse
from .fields.transform import Transform
from .files.folders import image_name
from .files.images import Image
from .geometry import Grid, jacobian_determinant
from .given import Given, scan, volume
from .options import Device, FieldGrid, Format, Refine
from .preparation.subject import Subject, find_both_lungs
from .registration import register as register_subjects
from .report import Report
from .results.apply import Interpolation, Resampling, affine_transform, field_transform, placed, read_any
from .results.outputs import image_kind, prepare_outputs, withdraw
from .results.ownership import TRANSFORMS
from .results.result import Result, Scan, read_result
from .results.transformfiles import read_inverse

Points = Float[np.ndarray, "p 3"]


@dataclass(frozen=True)
class _Case:
    """The data needed to write the results of a registration that was just computed."""

    fixed: Subject
    moving: Subject
    transform: Transform
    grid: Grid
    report: Report
    expected: ExpectedError | None


class Registration:
    """The map from a fixed to a moving scan, and back.

    Points are (n, 3), mm, LPS, components x, y, z; images are `SimpleITK.Image`. The forward map resamples images onto
    the fixed scan; *points* of the moving scan are mapped by the inverse.
    """

    def __init__(self, result: Result, back: Inverse | None, case: _Case | None = None) -> None:
        self._result, self._back, self._case = result, back, case

    @property
    def quality(self) -> dict[str, Any]:
        """The content of results.json: quality figures, warnings, timings."""
        return self._result.figures if self._case is None else self._case.report.to_dict()

    def to_moving(self, points_mm: Points | Sequence[Sequence[float]]) -> Points:
        """Positions in the moving scan of points of the fixed scan."""
        return self._result.to_moving(_points(points_mm))

    def to_fixed(self, points_mm: Points | Sequence[Sequence[float]]) -> Points:
        """Positions in the fixed scan of points of the moving scan; the map is inverted for each of them, to 0.0001
        mm."""
        return self._result.to_fixed(_points(points_mm))

    def in_lungs(self, points_mm: Points | Sequence[Sequence[float]], of: Scan) -> Bool[np.ndarray, " p"] | None:
        """Whether points lie in the lungs of their own scan; None if a loaded result does not hold the lungs."""
        return self._result.in_lungs(_points(points_mm), of)

    def jacobian_at(self, fixed_mm: Points | Sequence[Sequence[float]]) -> Float[np.ndarray, " p"]:
        """The ratio of the volume in the moving scan to that in the fixed one, around points of the fixed scan."""
        return self._result.jacobian_at(_points(fixed_mm))

    def expected_error_at(self, fixed_mm: Points | Sequence[Sequence[float]]) -> Float[np.ndarray, " p"]:
        """Expected error (mm) of the map at points of the fixed scan; -1 outside the lungs and outside the moving
        image. InputError if the result has no expected error."""
        found = self._result.expected_error_at(_points(fixed_mm))
        if found is None:
            raise InputError("the result has no expected error: the weights that it was made with do not tell")
        return found

    def jacobian(self) -> sitk.Image:
        """The Jacobian determinant as an image, on the grid that the field was computed on: around the fixed lungs, in
        steps of mm."""
        transform = self._result.transform
        determinant = jacobian_determinant(transform.displacement, transform.grid)[0].numpy()
        linear = transform.affine.determinant
        return placed(sitk.GetImageFromArray(determinant * np.float32(linear)), transform.grid)

    def displacement(self, grid: Grid) -> Float[torch.Tensor, "1 3 z y x"]:
        """The displacement (mm) from points of the fixed scan to the moving one, on any grid in fixed world
        coordinates."""
        return self._result.transform.field(grid)

    def expected_error(self) -> sitk.Image:
        """Expected error (mm) of the field in the lungs, on the grid on which it is estimated.

        -1 where it is not known. InputError if the result has no expected error.
        """
        expected = self._result.expected
        if expected is None:
            raise InputError("the result has no expected error: the weights that it was made with do not tell")
        return placed(sitk.GetImageFromArray(expected.at(expected.grid)[0, 0].numpy()), expected.grid)

    def warp(
        self,
        image: Given | None = None,
        onto: Scan = "fixed",
        interpolation: Interpolation = "linear",
        reference: Given | None = None,
        background: float | None = None,
    ) -> sitk.Image:
        """An image of the other scan, warped to the grid of the scan ``onto`` or of ``reference``.

        By default, the moving scan itself is warped onto the fixed one. ``background``: value outside the image; air
        for CT, otherwise 0. The type of the values is kept. InputError for an unsuitable image.
        """
        if image is None:
            image = self._scan("moving" if onto == "fixed" else "fixed")
        values, grid = _volume(image, "the image")
        target = self._result.grid(onto) if reference is None else _volume(reference, "the reference")[1]
        transform = self.sitk_transform() if onto == "fixed" else self.inverse()
        found = Resampling(transform, target, interpolation, background)(values, grid)
        return placed(sitk.GetImageFromArray(found), target)

    def warp_labels(self, labels: Given, onto: Scan = "fixed", reference: Given | None = None) -> sitk.Image:
        """A label map of the other scan, warped by nearest neighbour."""
        return self.warp(labels, onto, "nearest", reference)

    def sitk_transform(self) -> sitk.Transform:
        """The content of transform.h5: maps points of the fixed scan to the moving one, as needed to resample moving
        images."""
        transform = self._result.transform
        parts = affine_transform(transform.affine), field_transform(transform.displacement, transform.grid)
        return sitk.CompositeTransform(list(parts))

    def inverse(self) -> sitk.Transform:
        """The content of inverse.h5: maps points of the moving scan to the fixed one."""
        if self._back is None:
            raise InputError("the result has no inverse.h5, expected one that was written with --transforms on")
        back = self._back
        parts = [field_transform(*part) for part in (back.edges, back.rough, back.rest)]
        return sitk.CompositeTransform([*parts, affine_transform(back.affine)])

    def save(
        self,
        folder: str | os.PathLike[str],
        field_grid: FieldGrid = "fixed",
        transforms: bool = True,
        page: bool = True,
        format: Format = "auto",
    ) -> None:
        """Write the same files as the command, identical byte by byte except for the timings; InputError as for the
        command."""
        if self._case is None:
            raise InputError("the registration was loaded, expected one that was just done; its folder can be copied")
        case, root = self._case, Path(folder)
        inputs = [path for path in (case.fixed.image.path, case.moving.image.path) if path.exists()]
        name, kind = image_name(case.fixed.image.path), image_kind(format, case.fixed.image.path, "itk")
        outputs = prepare_outputs(root, name, inputs, page, transforms, suffixes=True, kind=kind)
        withdraw(root, False, inputs)
        deliver(
            outputs, case.grid, case.transform, case.fixed, case.moving, "itk", case.report, field_grid, case.expected
        )

    def _scan(self, which: Scan) -> sitk.Image:
        if self._case is None:
            raise InputError(f"the registration was loaded, without its {which} scan, expected an image to warp")
        image = getattr(self._case, which).image
        return placed(sitk.GetImageFromArray(image.voxels[0, 0].numpy()), image.grid)


class Registrar:
    """Registers pair after pair with the model in memory."""

    def __init__(self, weights: str | os.PathLike[str] | None = None, device: Device = "auto") -> None:
        """``weights``: by default the bundled ones. InputError if the weights or the device are not available."""
        _check_choice("device", device, get_args(Device))
        self._weights = load_cascade(find_weights(None if weights is None else Path(weights)))
        self._device = device
        choose_device(device, Report())

    def register(
        self,
        fixed: Given,
        moving: Given,
        refine: Refine = "full",
        fixed_mask: Given | None = None,
        moving_mask: Given | None = None,
    ) -> Registration:
        """The map from ``fixed`` to ``moving``: CT scans in HU, as paths, SimpleITK images or images of nibabel.

        Masks are lung masks, on any grid; missing ones are made from the HU. InputError for scans that cannot be
        registered, with a sentence that says why.
        """
        _check_choice("refine", refine, get_args(Refine))
        report = Report()
        device = choose_device(self._device, report)
        with report.timed("read"):
            images = scan(fixed, "fixed"), scan(moving, "moving")
        with report.timed("lungs"), _file(fixed_mask) as first, _file(moving_mask) as second:
            pair = find_both_lungs(images[0], first, images[1], second)
        _describe(report, images, pair, self._weights.sha256, str(device))
        insist = self._device == "cuda"
        transform, expected = register_subjects(*pair, self._weights, refine, device, report, insist)
        grid = images[0].grid
        with report.timed("check"):
            transform = unfolded(grid, transform, pair[0].lungs, report, _look_at_all)
        return _registration(_Case(*pair, transform, grid, report, expected))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}")


def register(
    fixed: Given,
    moving: Given,
    refine: Refine = "full",
    device: Device = "auto",
    fixed_mask: Given | None = None,
    moving_mask: Given | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Registration:
    """Register one pair, see `Registrar.register`; for several pairs, a `Registrar` keeps the model in memory."""
    return Registrar(weights, device).register(fixed, moving, refine, fixed_mask, moving_mask)


def load(folder: str | os.PathLike[str]) -> Registration:
    """The registration whose results lie in ``folder``; InputError if there are none."""
    result, path = read_result(Path(folder)), Path(folder) / TRANSFORMS[1]
    return Registration(result, read_inverse(path) if "inverse_residual_mm" in result.figures else None)


def _registration(case: _Case) -> Registration:
    whole = framed(case.transform)
    result = Result(whole, case.report.to_dict(), case.fixed.lungs, case.moving.lungs, case.expected)
    return Registration(result, inverse(whole, case.moving.lungs), case)


def _describe(
    report: Report, images: tuple[Image, Image], pair: tuple[Subject, Subject], sha256: str, device: str
) -> None:
    """Add the entries that the command writes to results.json, in the same order."""
    fixed, moving = images
    report.set(fixed=fixed.path.name, moving=moving.path.name, weights_sha256=sha256, device=device)
    for remark in (*pair[0].image.remarks, *pair[1].image.remarks):
        report.warn(remark)
    report.set(grids={"fixed": asdict(fixed.grid), "moving": asdict(moving.grid)})


def _look_at_all(slabs: Iterator[Any]) -> None:
    for _ in slabs:
        pass


def _points(points_mm: Points | Sequence[Sequence[float]]) -> Points:
    points = np.asarray(points_mm, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"the points are an array of {points.shape}, expected (n, 3): x, y, z in mm along LPS")
    return points


def _volume(given: Given, name: str) -> tuple[np.ndarray, Grid]:
    return read_any(Path(given)) if isinstance(given, str | os.PathLike) else volume(given, name)


@contextmanager
def _file(mask: Given | None) -> Iterator[Path | None]:
    """A mask as a file, which exists while the body runs."""
    if mask is None or isinstance(mask, str | os.PathLike):
        yield None if mask is None else Path(mask)
        return
    values, grid = volume(mask, "the mask")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.mha"
        sitk.WriteImage(placed(sitk.GetImageFromArray((values > 0.5).astype(np.uint8)), grid), str(path))
        yield path
