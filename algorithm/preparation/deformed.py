"""The rough deformable registration of the pre-alignment, and the affine map closest to it."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Affine, Grid, moving_index, resample, validity
from ..objective.adam import Adam
from ..objective.control_grid import smoothed, unsmoothed
from ..objective.diffusion import diffusion
from .scan import PrealignSettings, Scan, image_terms

SMOOTHING = 2
"""Number of means that smooth the control points of the deformable registration."""
FLAT = 3e-6
"""Adam's ε: a gradient below it moves a control point by less than a full step. Less than half of the gradients are
below. Without it, rounding errors would move a control point by a full step where the images have no structure."""


def closest_affine(fixed: Scan, moving: Scan, start: Affine, displacement: Float[Tensor, "1 3 z y x"]) -> Affine:
    """The least-squares affine map of start(x + u(x)), over the fixed lungs inside the moving field of view.

    u is in mm on the fixed grid.
    """
    seen = validity(displacement, fixed.grid, moving.grid, affine=start)
    z, y, x = np.nonzero(((fixed.lungs > 0.5) & seen)[0, 0].numpy())
    points = fixed.grid.to_world(np.stack([x, y, z], axis=1))
    return Affine.least_squares(points, start(points + displacement[0, :, z, y, x].T.double().numpy()))


def deformed_field(
    fixed: Scan,
    moving: Scan,
    affine: Affine,
    start: Float[Tensor, "1 3 zs ys xs"],
    start_grid: Grid,
    steps: int,
    settings: PrealignSettings,
) -> tuple[Float[Tensor, "1 3 zc yc xc"], Grid]:
    """Minimise by Adam over the displacement (mm, applied before ``affine``) on a control grid of twice the spacing."""
    x, y, z = ((n + 1) // 2 for n in fixed.grid.size)
    grid = fixed.grid.resized((x, y, z))
    voxel_mm = torch.tensor(fixed.grid.spacing).reshape(1, 3, 1, 1, 1)
    control = (unsmoothed(resample(start, start_grid, grid), SMOOTHING) / voxel_mm).requires_grad_()
    adam = Adam(control, settings.deformed_step_vox, steps, FLAT)
    for _ in range(steps):
        u = smoothed(control, SMOOTHING) * voxel_mm
        index = moving_index(fixed.grid, moving.grid, resample(u, grid, fixed.grid), affine, u)
        value, _ = image_terms(fixed, moving, index, settings, settings.deformed_window)
        adam.descend(value + settings.diffusion * diffusion(u, grid))
    return (smoothed(control, SMOOTHING) * voxel_mm).detach(), grid
