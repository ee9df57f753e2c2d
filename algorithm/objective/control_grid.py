"""Displacement fields given by control points: smoothed by small means, so that they are nearly a B-spline.

Siebert et al. 2021 ("Fast 3D registration with accurate optimisation ...") have it so.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def smoothed(control: Float[Tensor, "n 3 z y x"], times: int) -> Float[Tensor, "n 3 z y x"]:
    """``times`` 3³ means, border values repeated: nearly a B-spline of degree 2·``times`` - 1.

    Axis by axis, which is more than twice as fast as ``avg_pool3d``.
    """
    for _ in range(times):
        for axis in (2, 3, 4):
            size = control.shape[axis]
            ends = control.narrow(axis, 0, 1), control, control.narrow(axis, size - 1, 1)
            longer = torch.cat(ends, dim=axis)
            control = (longer.narrow(axis, 0, size) + control + longer.narrow(axis, 2, size)) / 3
    return control


def unsmoothed(displacement: Float[Tensor, "n 3 z y x"], times: int, rounds: int = 4) -> Float[Tensor, "n 3 z y x"]:
    """Control points whose `smoothed` field is nearly the given one (van Cittert's iteration): so it starts there.

    Nearly: what the smoothing takes away altogether, waves of two or three voxels, does not come back.
    """
    control = displacement
    for _ in range(rounds):
        control = control + displacement - smoothed(control, times)
    return control
