"""Volume change control, V (Hering et al. 2021, equations 3 and 6).

    V = 1/|Ω| ∫_Ω ψ_t(det ∇y) dx,    ψ_t(v) = (v - 1)²/v                     for v ≥ t
                                              (1 - 1/t²) v + 2 (1 - t)/t     otherwise

ψ_t is 0 where the volume does not change. Shrinking by v and growing by 1/v cost the same. Below t it rises linearly
towards folding (v ≤ 0) and beyond; a smaller t makes it steeper. Both branches have the same value and slope at t.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid, jacobian_determinant
from .domain import check_same_shape, domain_mean


def psi(determinant: Float[Tensor, "..."], t: float) -> Float[Tensor, "..."]:
    """ψ_t(v), value by value, equation (6); t in (0, 1), else InputError.

    One expression serves both branches: ψ(c) + ψ'(t) (v - c), with c = max(v, t) and ψ'(t) = 1 - 1/t². No division is
    by less than t, so no gradient is ever NaN.
    """
    if not 0 < t < 1:
        raise InputError(f"the volume change threshold t is {t}, expected a value between 0 and 1")
    above = determinant.clamp(min=t)
    return (above - 1) * ((above - 1) / above) + (1 - 1 / t**2) * (determinant - above)


def volume_change(
    displacement: Float[Tensor, "n 3 z y x"],
    grid: Grid,
    t: float,
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None = None,
) -> Float[Tensor, ""]:
    """V (no unit), a mean over the mask (by default the whole grid); an empty mask yields 0.

    Only the field counts: the constant determinant of an affine map that is applied after it is left out.
    """
    check_same_shape(grid.shape, displacement.shape[2:])
    return domain_mean(psi(jacobian_determinant(displacement, grid), t), mask)
