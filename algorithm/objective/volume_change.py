"""Volume change control, V (Hering et al. 2021, equations 3 and 6).

    V = 1/|Ω| ∫_Ω ψ_t(det ∇y) dx,    ψ_t(v) = (v - 1)²/v                     for v ≥ t
                                              (1 - 1/t²) v + 2 (1 - t)/t     otherwise

It is 0 where volume is kept, takes shrinking by v and growing by 1/v alike, and rises linearly towards and beyond
folding (v ≤ 0), the more steeply the smaller t. Both branches meet at t in value and slope.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid, jacobian_determinant
from .domain import check_same_shape, domain_mean


def psi(determinant: Float[Tensor, "..."], t: float) -> Float[Tensor, "..."]:
    """ψ_t(v), value by value, equation (6); t in (0, 1), else InputError.

    Written as one expression with c = max(v, t), as the line through (t, ψ(t)) with slope ψ'(t) = 1 - 1/t²; nothing is
    divided by less than t, so no gradient is ever NaN.
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

    Sees the field only: where an affine map is applied after it, its constant determinant is not counted.
    """
    check_same_shape(grid.shape, displacement.shape[2:])
    return domain_mean(psi(jacobian_determinant(displacement, grid), t), mask)
