"""Displacement fields given by control points: smoothed by small means, so that they are nearly a B-spline.

Siebert et al. 2021 ("Fast 3D registration with accurate optimisation ...") have it so.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def smoothed(control: Float[Tensor, "n 3 z y x"], times: int) -> Float[Tensor, "n 3 z y x"]:
    """``times`` 3³ means, border values repeated: nearly a B-spline of degree 2·``times`` - 1."""
    for _ in range(times):
        control = F.avg_pool3d(F.pad(control, [1] * 6, mode="replicate"), 3, stride=1)
    return control


def unsmoothed(displacement: Float[Tensor, "n 3 z y x"], times: int, rounds: int = 4) -> Float[Tensor, "n 3 z y x"]:
    """Control points whose `smoothed` field is nearly the given one (van Cittert's iteration): so it starts there.

    Nearly: what the smoothing takes away altogether, waves of two or three voxels, does not come back.
    """
    control = displacement
    for _ in range(rounds):
        control = control + displacement - smoothed(control, times)
    return control
