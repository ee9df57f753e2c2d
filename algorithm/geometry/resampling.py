"""Resampling of volumes to other grids. Large images are resampled in parts."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .grids import Affine, Grid, Size, are_parallel, index_steps, slabs, steps_between
from .sampling import inside, moving_index, sample

_PART_VOXELS = 2**24
"""Approximate number of voxels of a source image that are held as float at a time."""


def resample(
    volume: Float[Tensor, "n c zs ys xs"], source: Grid, target: Grid, fill: float | None = None
) -> Float[Tensor, "n c z y x"]:
    """A volume or field on another grid of the same world, by trilinear interpolation.

    Smooth it first when the target is coarser.
    """
    if source == target:
        return volume
    if fill is None and are_parallel(source, target, Affine()):
        return _interpolated(volume, source, target)
    return sample(volume, moving_index(target, source, None, Affine(), volume), fill)


def _interpolated(volume: Tensor, source: Grid, target: Grid) -> Tensor:
    """`resample` for parallel axes: one matrix for each axis. Several times faster than `warp`."""
    along_x, along_y, along_z = (weights.to(volume) for weights in _weights(source, target, Affine(), smoothed=False))
    return along_y @ torch.einsum("ts,ncsyx->nctyx", along_z, volume) @ along_x.T


def doubled(volume: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n c zd yd xd"]:
    """The same as `resample` from ``grid.coarsened(2)`` to ``grid``, but faster."""
    return F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)


def resample_image(
    image: Tensor, source: Grid, target: Grid, *, affine: Affine = Affine(), least: float, fill: float
) -> Float[Tensor, "1 1 z y x"]:
    """An image (1 1 z y x, any type) at affine(x), x on ``target``, smoothed first along axes that become coarser.

    Only the needed part of the source is converted to float, and never more than some million voxels at a time. Values
    below ``least`` (padding) are raised to ``least`` before the smoothing. Outside the source, the value is ``fill``.
    The variance of the Gaussian is the variance of the target voxel's box minus that of the source voxel's box, both
    measured along the source axes: (step² - 1) / 12 source voxels².
    """
    resampled = _axis_by_axis if are_parallel(source, target, affine) else _slab_by_slab
    values = resampled(image, source, target, affine, least)
    return torch.where(inside(moving_index(target, source, None, affine, values), source.shape)[:, None], values, fill)


def _axis_by_axis(image: Tensor, source: Grid, target: Grid, affine: Affine, least: float) -> Tensor:
    """`resample_image` without ``fill``, for parallel axes.

    One matrix for each axis does smoothing and interpolation together, so only the needed smoothed voxels are computed.
    """
    start, size = needed_part(source, target, affine)
    (x, y, z), (nx, ny, nz) = start, size
    weights = _weights(source.cropped(start, size), target, affine, smoothed=True)
    along_x, along_y, along_z = (along.to(image.device) for along in weights)
    volume = image[0, 0, z : z + nz, y : y + ny, x : x + nx]
    parts = []
    for rows in volume.split(max(1, _PART_VOXELS // (nx * nz)), dim=1):
        coarse = torch.tensordot(along_z, rows.float().clamp(min=least), dims=1)
        parts.append(coarse @ along_x.T)
    return (along_y @ torch.cat(parts, dim=1))[None, None]


def _weights(source: Grid, target: Grid, affine: Affine, *, smoothed: bool) -> list[Float[Tensor, "t s"]]:
    """`_axis_weights` along x, y and z, for parallel axes."""
    first = source.to_index(affine(np.array(target.origin)))
    steps = np.diag(index_steps(source, target, affine))
    return [
        _axis_weights(start + step * np.arange(count), number, _sigma(step) if smoothed else 0.0)
        for start, step, count, number in zip(first, steps, target.size, source.size, strict=True)
    ]


def _axis_weights(index: np.ndarray, number: int, sigma: float) -> Float[Tensor, "t s"]:
    """One row for each continuous index: the weights of the ``number`` voxels.

    They interpolate linearly between the Gaussian means of the voxels. Border values are repeated outside.
    """
    low = np.clip(np.floor(index).astype(int), 0, number - 1)
    share = np.clip(index - low, 0, 1)
    taps = _taps(sigma)
    weights = np.zeros((len(index), number))
    for voxel, part in ((low, 1 - share), (np.minimum(low + 1, number - 1), share)):
        for shift, tap in enumerate(taps, start=-(len(taps) // 2)):
            np.add.at(weights, (np.arange(len(index)), np.clip(voxel + shift, 0, number - 1)), part * tap)
    return torch.from_numpy(weights.astype(np.float32))


def _slab_by_slab(image: Tensor, source: Grid, target: Grid, affine: Affine, least: float) -> Tensor:
    """`resample_image` without ``fill``: smooth at full resolution, then sample, in slabs of the target along z."""
    part_voxels = math.prod(needed_part(source, target, affine)[1])
    most = max(1, int(math.prod(target.size) * min(1.0, _PART_VOXELS / part_voxels)))
    parts = []
    for slab in slabs(target, most):
        start, size = needed_part(source, slab, affine)
        (x, y, z), (nx, ny, nz) = start, size
        part = image[:, :, z : z + nz, y : y + ny, x : x + nx].float().clamp(min=least)
        for axis, ratio in zip((4, 3, 2), steps_between(source, target, affine), strict=True):
            part = _gaussian(part, _sigma(ratio), axis)
        parts.append(sample(part, moving_index(slab, source.cropped(start, size), None, affine, part)))
    return torch.cat(parts, dim=2)


def needed_part(source: Grid, target: Grid, affine: Affine) -> tuple[Size, Size]:
    """First voxel and size of the part of ``source`` that `resample_image` reads for ``target``."""
    corners = np.array([[i * (n - 1) for i, n in zip(c, target.size, strict=True)] for c in np.ndindex(2, 2, 2)])
    index = source.to_index(affine(target.to_world(corners)))
    margin = 2 + 2 * steps_between(source, target, affine)
    last = np.array(source.size) - 1
    low = np.clip(np.floor(index.min(axis=0) - margin), 0, last).astype(int)
    high = np.clip(np.ceil(index.max(axis=0) + margin), 0, last).astype(int)
    (x, y, z), (nx, ny, nz) = low.tolist(), (high - low + 1).tolist()
    return (x, y, z), (nx, ny, nz)


def _sigma(step: float) -> float:
    """Standard deviation (source voxels) of the smoothing before sampling in steps of ``step`` source voxels."""
    return float(np.sqrt(max(step**2 - 1, 0) / 12))


def _taps(sigma: float) -> np.ndarray:
    """Gaussian weights for ``sigma`` voxels: an odd number of them, with sum 1."""
    radius = math.ceil(3 * sigma) if sigma >= 0.2 else 0
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 0.2)) ** 2)
    taps: np.ndarray = weights / weights.sum()
    return taps


def _gaussian(volume: Tensor, sigma: float, axis: int) -> Tensor:
    """Smooth by a Gaussian of ``sigma`` voxels along one axis; border values are repeated.

    The sum of shifted copies is faster than ``conv3d``.
    """
    taps = _taps(sigma).tolist()
    radius, n = len(taps) // 2, volume.shape[axis]
    if radius == 0:
        return volume
    total: Tensor = taps[radius] * volume
    for shift in range(1, radius + 1):
        tap, reach = taps[radius + shift], min(shift, n)
        for here, there, border, edge in ((0, shift, n - reach, n - 1), (shift, 0, 0, 0)):
            if shift < n:
                total.narrow(axis, here, n - shift).add_(volume.narrow(axis, there, n - shift), alpha=tap)
            total.narrow(axis, border, reach).add_(volume.narrow(axis, edge, 1), alpha=tap)
    return total


def downsample(volume: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n c zh yh xh"]:
    """Half the resolution: filter (1 3 3 1)/8 along each axis, stride 2. The result lies on ``grid.coarsened(2)``."""
    for axis in (2, 3, 4):  # sums of every second voxel: several times faster than convolutions of one channel
        pad = [0] * 6
        pad[2 * (4 - axis)] = pad[2 * (4 - axis) + 1] = 1
        padded = F.pad(volume, pad, mode="replicate")
        before, left, right, after = (
            padded[(slice(None),) * axis + (slice(start, start + volume.shape[axis] - 1, 2),)] for start in range(4)
        )
        volume = (left + right).mul_(3).add_(before).add_(after).div_(8)
    return volume


def downsample_by(volume: Float[Tensor, "n c z y x"], factor: int) -> Float[Tensor, "n c zc yc xc"]:
    """Apply `downsample` log2(factor) times; ValueError unless factor is a power of two."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"downsampling by {factor}: expected a power of two")
    for _ in range(factor.bit_length() - 1):
        volume = downsample(volume)
    return volume
