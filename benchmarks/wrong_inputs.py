"""Inputs that are wrong, and some that only look so, made from a pair: what `benchmarks.trust --wrong` registers.

Wrong masks, scans that are mirrored or folded, or hold no lung; and fixed and moving exchanged, which is not wrong.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage

from algorithm.files.images import Image, canonical
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, displacement_at, moved, resample, warp_image
from algorithm.hounsfield import AIR_HU
from algorithm.lungs import LungMask, lung_mask
from algorithm.lungs.sides import LEFT, left_and_right

ASIDE_MM = 30.0
FOLD_MM, WAVE_MM = 15.0, 60.0
"""A wave of that amplitude and length, along z in the middle of a lung: det(I + ∇v) = 1 - 2π · 15 / 60 < 0 there."""
SOFT_TISSUE_HU, NOISE_HU = 40.0, 20.0

Points = Float[np.ndarray, "n 3"]


class Wrong(NamedTuple):
    """Two scans, masks for them, and how positions (mm) lie in them."""

    name: str
    fixed: Image
    moving: Image
    masks: tuple[Path | None, Path | None] = (None, None)
    swapped: bool = False
    undone: Callable[[Points], Points] | None = None
    """From a position in the moving scan to that in the scan that it was made of."""


def wrong_inputs(fixed: Image, moving: Image, folder: Path) -> Iterator[Wrong]:
    """All of them; masks are written into ``folder``."""
    fixed, moving = canonical(fixed), canonical(moving)
    lungs = tuple(lung_mask(scan.voxels, scan.grid) for scan in (fixed, moving))
    for name, masks in wrong_masks(*lungs).items():
        for side, role in enumerate(("fixed", "moving")):
            path = folder / f"{role} mask {name}.mha"
            write_image(path, masks[side].mask.to(torch.uint8), masks[side].grid)
            yield Wrong(f"{role} mask {name}", fixed, moving, (None, path) if side else (path, None))
    yield Wrong("exchanged", moving, fixed, swapped=True)
    for name, axis in (("mirrored", 0), ("upside down", 2)):
        image, world = mirrored(moving, axis)
        yield Wrong(f"moving {name}", fixed, image, undone=world)
    image, undone = folded(moving, lungs[1])
    yield Wrong("moving folded", fixed, image, undone=undone)
    yield Wrong("moving without lungs", fixed, without_lungs(moving, lungs[1]))


def wrong_masks(fixed: LungMask, moving: LungMask) -> dict[str, tuple[LungMask, LungMask]]:
    """By name, for the fixed and for the moving scan."""
    made: dict[str, Callable[[LungMask], LungMask]] = {
        "of everything": lambda lungs: replace(lungs, mask=torch.ones_like(lungs.mask)),
        "inverted": lambda lungs: replace(lungs, mask=~lungs.mask),
        "of one lung": lambda lungs: replace(lungs, mask=left_and_right(lungs) == LEFT),
        "aside": lambda lungs: replace(lungs, grid=moved(lungs.grid, Affine(offset=(ASIDE_MM, 0.0, 0.0)))),
    }
    return {name: (make(fixed), make(moving)) for name, make in made.items()} | {"of the other scan": (moving, fixed)}


def mirrored(image: Image, axis: int) -> tuple[Image, Affine]:
    """A scan backwards along an index axis, its grid as it was; and the reflection (mm)."""
    grid, sign = image.grid, np.ones(3)
    sign[axis] = -1
    middle = grid.to_world((np.array(grid.size) - 1) / 2)
    matrix = np.array(grid.direction) @ np.diag(sign) @ np.array(grid.direction).T
    world = Affine.from_arrays(matrix, middle - matrix @ middle)
    return replace(image, voxels=image.voxels.flip(4 - axis).contiguous()), world


def folded(image: Image, lungs: LungMask) -> tuple[Image, Callable[[Points], Points]]:
    """A scan x ↦ image(x + v(x)), and x ↦ x + v(x): v folds in the middle of a lung and is zero far from there."""
    depth = ndimage.distance_transform_edt(np.pad(lungs.mask[0, 0].numpy(), 1), sampling=lungs.grid.spacing[::-1])
    middle = lungs.grid.to_world(np.array(np.unravel_index(depth.argmax(), depth.shape))[::-1] - 1)
    coarse = image.grid.resized((64, 64, 64))
    z, y, x = np.indices(coarse.shape)
    away = coarse.to_world(np.stack([x, y, z], axis=-1)) - middle
    wave = -FOLD_MM * np.sin(2 * np.pi * away[..., 2] / WAVE_MM) * np.exp(-((away / WAVE_MM) ** 2).sum(axis=-1))
    field = torch.from_numpy(np.stack([0 * wave, 0 * wave, wave])[None]).float()
    displacement = resample(field, coarse, image.grid)
    voxels = warp_image(image.voxels, image.grid, displacement, image.grid, fill=AIR_HU).to(image.voxels.dtype)

    def undone(points: Points) -> Points:
        there = torch.from_numpy(np.ascontiguousarray(points))
        mapped: Points = points + displacement_at(there, displacement, image.grid).numpy()
        return mapped

    return replace(image, voxels=voxels), undone


def without_lungs(image: Image, lungs: LungMask) -> Image:
    """A scan with noisy soft tissue for the lungs and all other air in the box around them."""
    inside = resample(lungs.mask.float(), lungs.grid, image.grid)
    inside = torch.nn.functional.max_pool3d(inside, 5, stride=1, padding=2) > 0
    noise = torch.randn(inside.shape, generator=torch.Generator().manual_seed(0))
    tissue = (SOFT_TISSUE_HU + NOISE_HU * noise).to(image.voxels.dtype)
    return replace(image, voxels=torch.where(inside, tissue, image.voxels))
