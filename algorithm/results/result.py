"""A finished registration, read from its output folder: the map between the two scans in both directions.

u maps points of the fixed scan to the moving one. So the forward map resamples images of the moving scan onto the fixed
one, while *points* of the moving scan need the inverse map.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from ..fields.expected_error import ExpectedError
from ..fields.frame import coarse
from ..fields.newton import at_points, derivative, displaced, undone
from ..fields.transform import Transform
from ..files.folders import images_in
from ..files.images import read_field, read_volume
from ..geometry import Grid, resample
from ..lungs import LungMask
from .ownership import KINDS, RESULTS, TRANSFORMS
from .transformfiles import read_expected_error, read_lungs, read_transform

Scan = Literal["fixed", "moving"]
MOST_VOXELS = 2**24
"""Maximum number of voxels of a field that is kept in double precision with its derivatives."""
STEPS = 10
CLOSE_MM = 1e-4
"""Accuracy of the inverse map of points."""


@dataclass(frozen=True)
class Result:
    """The map x ↦ affine(x + u(x)) from the fixed to the moving scan, and what is known of the two.

    Points are arrays (n, 3) in mm along LPS axes, at any position. Outside the field only the affine map applies.
    """

    transform: Transform
    figures: dict[str, Any]
    """The content of results.json."""
    fixed_lungs: LungMask | None = None
    moving_lungs: LungMask | None = None
    expected: ExpectedError | None = None

    def to_moving(self, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
        """Positions in the moving scan of points of the fixed scan."""
        transform = self.transform
        return transform.affine(displaced(points_mm, transform.displacement, transform.grid))

    def to_fixed(self, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
        """Positions in the fixed scan of points of the moving scan; the map is inverted for each of them, to 0.0001
        mm."""
        targets = torch.from_numpy(self.transform.affine.inverse()(points_mm))
        start = targets - at_points(targets, *self._displacement)
        result: np.ndarray = undone(targets, self._displacement, self._slope, start, STEPS, CLOSE_MM).numpy()
        return result

    def mapped(self, points_mm: Float[np.ndarray, "p 3"], of: Scan) -> Float[np.ndarray, "p 3"]:
        """Positions in the other scan of points of the scan ``of``."""
        return self.to_moving(points_mm) if of == "fixed" else self.to_fixed(points_mm)

    def jacobian_at(self, fixed_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, " p"]:
        """The ratio of the volume in the moving scan to that in the fixed one, around points of the fixed scan."""
        transform = self.transform
        matrices = at_points(torch.from_numpy(np.asarray(fixed_mm)), *self._slope).double().reshape(-1, 3, 3)
        found: np.ndarray = torch.linalg.det(matrices).numpy() * transform.affine.determinant
        return found

    def in_lungs(self, points_mm: Float[np.ndarray, "p 3"], of: Scan) -> Bool[np.ndarray, " p"] | None:
        """Whether points lie in the lungs of their own scan; None if the result holds no lungs."""
        lungs = self.fixed_lungs if of == "fixed" else self.moving_lungs
        return None if lungs is None else _inside(lungs, points_mm)

    def expected_error_at(self, fixed_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, " p"] | None:
        """Expected error of the map (mm) at points of the fixed scan; -1 outside the lungs and outside the moving
        image. None if the result has no expected error."""
        return None if self.expected is None else self.expected.at_points(np.asarray(fixed_mm, np.float64))

    def grid(self, of: Scan) -> Grid:
        """The grid of a scan as it was given; InputError if the result does not hold it."""
        try:
            found = self.figures["grids"][of]
            rows = tuple(tuple(row) for row in found["direction"])
            return Grid(tuple(found["size"]), tuple(found["spacing"]), tuple(found["origin"]), rows)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"results.json: does not say on which grid the {of} scan is, expected --reference with an image"
            ) from error

    @cached_property
    def _displacement(self) -> tuple[Float[Tensor, "1 3 _ _ _"], Grid]:
        """The displacement field and its grid, in double precision if the field is small enough."""
        u = self.transform.displacement
        return (u.double() if u.shape[2:].numel() <= MOST_VOXELS else u), self.transform.grid

    @cached_property
    def _slope(self) -> tuple[Float[Tensor, "1 9 _ _ _"], Grid]:
        """I + ∇u, on the grid of the field if its nine numbers per voxel fit; otherwise on a coarser grid, which is
        sufficient."""
        u, grid = self.transform.displacement, self.transform.grid
        coarser = coarse(grid, MOST_VOXELS)
        return derivative(resample(u, grid, coarser), coarser), coarser


def _inside(lungs: LungMask, points_mm: Float[np.ndarray, "p 3"]) -> Bool[np.ndarray, " p"]:
    index = np.rint(lungs.grid.to_index(points_mm)).astype(int)
    within = ((index >= 0) & (index < lungs.grid.size)).all(axis=1)
    x, y, z = np.where(within[:, None], index, 0).T
    found: np.ndarray = lungs.mask[0, 0].numpy()[z, y, x] & within
    return found


def read_result(folder: Path) -> Result:
    """The result that a run wrote into ``folder``, from transform.h5 or else the field. InputError if there is
    neither."""
    figures = read_figures(folder)
    there, back = (folder / name for name in TRANSFORMS)
    if "inverse_residual_mm" in figures:
        expected = read_expected_error(there) or _expected_error(folder)
        return Result(read_transform(there), figures, read_lungs(there), read_lungs(back), expected)
    fields = images_in(folder / "images" / KINDS[0])
    if len(fields) != 1:
        raise InputError(f"{folder}: has no {there.name} and {len(fields)} displacement fields, expected one of a kind")
    return Result(Transform(*read_field(fields[0])), figures, expected=_expected_error(folder))


def _expected_error(folder: Path) -> ExpectedError | None:
    """The expected error from its image; None without one."""
    images = images_in(folder / "images" / KINDS[2])
    if len(images) != 1:
        return None
    values, grid = read_volume(images[0])
    return ExpectedError.from_image(torch.from_numpy(values.astype(np.float32))[None, None], grid)


def scan_path(folder: Path, figures: dict[str, Any], of: Scan, given: Path | None = None) -> Path:
    """The file or folder of a scan: the ``given`` one, or the path in results.json. InputError if it does not exist."""
    if given is None:
        said = (figures.get("paths") or {}).get(of)
        if said is None:
            raise InputError(f"{folder}: results.json does not say where the {of} scan lies, expected --{of} with it")
        given = Path(os.path.normpath(folder.resolve() / said))
        if not given.exists():
            raise InputError(f"{given}: the {of} scan is not there any more, expected --{of} with its new place")
    elif not given.exists():
        raise InputError(f"{given}: there is no such file or folder, expected the {of} scan")
    return given


def read_figures(folder: Path) -> dict[str, Any]:
    """The content of results.json; InputError if it does not exist."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), expected a folder that a registration wrote its results into"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON, expected that of a finished registration") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object, expected that of a finished registration")
    return content
