"""What all terms share: derivatives, invariances, empty masks, batches; and their sum."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import Grid, jacobian_determinant
from algorithm.objective import (
    Keypoints,
    Weights,
    curvature,
    diffusion,
    keypoint_distance,
    mask_distance,
    ngf_distance,
    objective,
    volume_change,
)
from algorithm.objective.local_correlation import local_correlation_distance
from algorithm.objective.mind import mind_distance, mind_ssc
from tests.support.grids import ROTATION
from tests.support.strategies import as_matrix, examples, generators, rotations

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(15)
GRID = Grid(
    size=(7, 6, 5),
    spacing=(0.7, 1.1, 2.5),
    origin=(-120.0, 33.0, 410.0),
    direction=ROTATION,
)


@dataclass(frozen=True)
class Case:
    """One random pair in double precision, with a field rough enough to fold (determinants on both sides of t)."""

    grid: Grid
    fixed: Tensor
    warped: Tensor
    mask: Tensor
    displacement: Tensor
    fixed_labels: Tensor
    warped_labels: Tensor
    fixed_mm: Tensor
    moving_mm: Tensor


def random_case(noise: torch.Generator, grid: Grid = GRID) -> Case:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    index = 0.1 + 0.8 * torch.rand(8, 3, generator=noise, dtype=torch.float64) * (torch.tensor(grid.size) - 1)
    points = torch.from_numpy(grid.to_world(index.numpy()))
    return Case(
        grid=grid,
        fixed=10 * randn(1, 1, *grid.shape),
        warped=10 * randn(1, 1, *grid.shape),
        mask=randn(1, 1, *grid.shape).clamp(min=0),
        displacement=0.5 * randn(1, 3, *grid.shape),
        fixed_labels=randn(1, 2, *grid.shape).sigmoid(),
        warped_labels=randn(1, 2, *grid.shape).sigmoid(),
        fixed_mm=points,
        moving_mm=points + randn(8, 3),
    )


Term = Callable[[Case], Tensor]
TERMS: dict[str, tuple[str, Term]] = {
    "D": ("warped", lambda c: ngf_distance(c.fixed, c.warped, c.grid, c.mask, 3.0)),
    "R": ("displacement", lambda c: curvature(c.displacement, c.grid, c.mask)),
    "B": ("warped_labels", lambda c: mask_distance(c.fixed_labels, c.warped_labels, c.mask)),
    "V": ("displacement", lambda c: volume_change(c.displacement, c.grid, 0.2, c.mask)),
    "K": ("displacement", lambda c: keypoint_distance(c.fixed_mm, c.moving_mm, c.displacement, c.grid)),
    "diffusion": ("displacement", lambda c: diffusion(c.displacement, c.grid)),
    "local correlation": ("warped", lambda c: local_correlation_distance(c.fixed, c.warped, c.mask, noise_hu=5.0)),
    "MIND": ("warped", lambda c: mind_distance(mind_ssc(c.fixed), c.warped, c.mask)),
}
"""Each term, with the variable that it is minimised in."""
MASKED = [name for name in TERMS if name not in ("K", "diffusion")]


def as_function(name: str, case: Case) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    variable, term = TERMS[name]
    return lambda value: term(replace(case, **{variable: value})), getattr(case, variable)


# Derivatives


@pytest.mark.parametrize("name", TERMS)
def test_gradcheck(name: str) -> None:
    function, start = as_function(name, random_case(torch.Generator().manual_seed(0)))
    assert torch.autograd.gradcheck(function, start.clone().requires_grad_(), fast_mode=False)


def test_gradcheck_meets_both_branches_of_psi() -> None:
    case = random_case(torch.Generator().manual_seed(0))
    determinant = jacobian_determinant(case.displacement, case.grid)
    assert (determinant < 0.2).any() and (determinant > 0.2).any()


@pytest.mark.parametrize("name", TERMS)
@PROPERTY
@given(noise=generators())
def test_taylor(name: str, noise: torch.Generator) -> None:
    """(f(x + h v) - f(x - h v)) / 2h is ⟨∇f, v⟩, but for a small share of the most that it can be, ‖∇f‖ ‖v‖.

    The share is what kinks of a term may make of it; 1 / √n, for n voxels, is what a wrong gradient makes.
    """
    function, start = as_function(name, random_case(noise))
    x = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x)
    step = torch.randn(x.shape, generator=noise, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        along = float(function(x + h * step) - function(x - h * step)) / (2 * h)
    most = float(slope.norm() * step.norm())
    assert abs(along - float((slope * step).sum())) <= 1e-4 * most + 1e-9


def test_a_descent_step_pulls_keypoints_together() -> None:
    case = random_case(torch.Generator().manual_seed(3))
    function, start = as_function("K", case)
    x = start.clone().requires_grad_()
    before = function(x)
    before.backward()
    assert x.grad is not None
    assert function(start - 0.1 * x.grad) < before


# Invariances


def flipped(case: Case, axis: int) -> Case:
    """Everything mirrored along an index axis (0 for x): volumes, the field's component along it, the points."""
    normal = torch.tensor(case.grid.direction, dtype=torch.float64)[:, axis]
    mirror = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    centre = torch.from_numpy(case.grid.to_world((np.array(case.grid.size) - 1) / 2))
    volumes = ("fixed", "warped", "mask", "displacement", "fixed_labels", "warped_labels")
    turned = replace(case, **{name: getattr(case, name).flip(-1 - axis) for name in volumes})
    return replace(
        turned,
        displacement=torch.einsum("ij,njzyx->nizyx", mirror, turned.displacement),
        fixed_mm=(case.fixed_mm - centre) @ mirror + centre,
        moving_mm=(case.moving_mm - centre) @ mirror + centre,
    )


def rotated(case: Case, rotation: np.ndarray) -> Case:
    """The same voxels in a turned world: grid, field and points."""
    grid, turn = case.grid, torch.from_numpy(rotation)
    x, y, z = (float(v) for v in rotation @ np.array(grid.origin))
    return replace(
        case,
        grid=replace(grid, direction=as_matrix(rotation @ np.array(grid.direction)), origin=(x, y, z)),
        displacement=torch.einsum("ij,njzyx->nizyx", turn, case.displacement),
        fixed_mm=case.fixed_mm @ turn.T,
        moving_mm=case.moving_mm @ turn.T,
    )


@pytest.mark.parametrize("name", TERMS)
@PROPERTY
@given(noise=generators(), axis=st.integers(0, 2))
def test_flipping_everything_changes_nothing(name: str, noise: torch.Generator, axis: int) -> None:
    case = random_case(noise)
    term = TERMS[name][1]
    torch.testing.assert_close(term(flipped(case, axis)), term(case), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["R", "V"])
def test_flipping_without_the_component_does_change(name: str) -> None:
    """R is blind to it, a sum over components of squares; V is not."""
    grid = replace(GRID, direction=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    case = random_case(torch.Generator().manual_seed(0), grid)
    wrong = replace(case, displacement=case.displacement.flip(-1), mask=case.mask.flip(-1))
    difference = abs(float(TERMS[name][1](wrong) - TERMS[name][1](case)))
    assert (difference > 0.1) == (name == "V")


@pytest.mark.parametrize("name", TERMS)
@PROPERTY
@given(noise=generators(), rotation=rotations())
def test_the_direction_of_the_world_changes_nothing(name: str, noise: torch.Generator, rotation: np.ndarray) -> None:
    case = random_case(noise)
    term = TERMS[name][1]
    torch.testing.assert_close(term(rotated(case, rotation)), term(case), rtol=1e-4, atol=1e-10)


@PROPERTY
@given(noise=generators(), scale=st.floats(0.01, 100.0), sign=st.sampled_from([1.0, -1.0]), shift=st.floats(-1e3, 1e3))
def test_ngf_under_linear_maps_of_intensity(noise: torch.Generator, scale: float, sign: float, shift: float) -> None:
    """Both images a·I + b (a < 0: both contrasts reversed) with ε scaled by |a|."""
    case = random_case(noise)
    before = ngf_distance(case.fixed, case.warped, case.grid, case.mask, 3.0)
    images = [sign * scale * image + shift for image in (case.fixed, case.warped)]
    torch.testing.assert_close(ngf_distance(*images, case.grid, case.mask, 3.0 * scale), before, rtol=1e-6, atol=1e-9)


@PROPERTY
@given(noise=generators())
def test_ngf_under_reversal_of_one_contrast(noise: torch.Generator) -> None:
    """Unchanged where edges are well above ε, as the distance of lines, not arrows."""
    case = random_case(noise)
    reversed_ = ngf_distance(case.fixed, -case.warped, case.grid, case.mask, 1e-4)
    torch.testing.assert_close(
        reversed_, ngf_distance(case.fixed, case.warped, case.grid, case.mask, 1e-4), rtol=1e-4, atol=0
    )


@PROPERTY
@given(noise=generators(), epsilon=st.floats(1e-3, 1e3))
def test_ngf_lies_between_0_and_1_and_is_symmetric(noise: torch.Generator, epsilon: float) -> None:
    case = random_case(noise)
    value = ngf_distance(case.fixed, case.warped, case.grid, case.mask, epsilon)
    assert -1e-12 <= float(value) <= 1
    torch.testing.assert_close(ngf_distance(case.warped, case.fixed, case.grid, case.mask, epsilon), value)
    assert abs(float(ngf_distance(case.fixed, case.fixed, case.grid, case.mask, epsilon))) < 1e-12


# Masks and batches


@pytest.mark.parametrize("name", [name for name in MASKED if name != "MIND"])
def test_what_lies_beyond_the_mask_has_no_influence(name: str) -> None:
    """One voxel beyond the mask may count, by differences; the rest neither in value nor in gradient. (MIND reaches
    two voxels, and is scaled by the whole image.)"""
    case = random_case(torch.Generator().manual_seed(0))
    mask = torch.zeros_like(case.mask)
    mask[..., :2, :3, :3] = 0.5
    reach = torch.zeros_like(mask, dtype=torch.bool)
    reach[..., :3, :4, :4] = True
    function, start = as_function(name, replace(case, mask=mask))
    x = start.clone().requires_grad_()
    value = function(x)
    (slope,) = torch.autograd.grad(value, x)
    beyond = ~reach.expand_as(slope)
    assert (slope[beyond] == 0).all() and (slope[~beyond] != 0).any()
    assert function(torch.where(beyond, 1e6, start)) == value


@pytest.mark.parametrize("name", MASKED)
def test_only_the_proportions_of_mask_weights_count(name: str) -> None:
    case = random_case(torch.Generator().manual_seed(0))
    term = TERMS[name][1]
    torch.testing.assert_close(term(replace(case, mask=1e-6 * case.mask)), term(case))
    whole = term(replace(case, mask=torch.ones_like(case.mask)))
    torch.testing.assert_close(term(replace(case, mask=torch.ones_like(case.mask, dtype=torch.bool))), whole)
    torch.testing.assert_close(term(replace(case, mask=None)), whole)


@pytest.mark.parametrize("name", [name for name in TERMS if name != "diffusion"])
def test_an_empty_domain_is_exactly_zero_with_zero_gradient(name: str) -> None:
    case = random_case(torch.Generator().manual_seed(0))
    none = torch.zeros(0, 3, dtype=torch.float64)
    empty = replace(case, mask=torch.zeros_like(case.mask), fixed_mm=none, moving_mm=none)
    function, start = as_function(name, empty)
    x = start.clone().requires_grad_()
    value = function(x)
    value.backward()
    assert value == 0 and x.grad is not None and (x.grad == 0).all()


def test_keypoints_without_weight_are_exactly_zero() -> None:
    case = random_case(torch.Generator().manual_seed(0))
    x = case.displacement.clone().requires_grad_()
    value = keypoint_distance(case.fixed_mm, case.moving_mm, x, case.grid, torch.zeros(8))
    value.backward()
    assert value == 0 and x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("name", MASKED)
def test_a_batch_is_the_mean_of_its_samples(name: str) -> None:
    """With masks of unlike volume, one of them empty."""
    noise = torch.Generator().manual_seed(5)
    cases = [random_case(noise) for _ in range(3)]
    cases[1].mask[..., 1:] = 0
    cases[2].mask[:] = 0
    term = TERMS[name][1]
    volumes = ("fixed", "warped", "mask", "displacement", "fixed_labels", "warped_labels")
    batch = replace(cases[0], **{name: torch.cat([getattr(c, name) for c in cases]) for name in volumes})
    torch.testing.assert_close(term(batch), torch.stack([term(c) for c in cases]).mean())


# The sum

WEIGHTS = Weights(alpha=3.0, beta=2.0, gamma=0.5, delta=0.25, t=0.2)


def evaluate(case: Case, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(
        case.displacement,
        case.grid,
        weights,
        TERMS["D"][1](case),
        fixed_labels=case.fixed_labels,
        warped_labels=case.warped_labels,
        keypoints=[Keypoints(case.fixed_mm, case.moving_mm)],
    )


def test_objective_is_the_weighted_sum() -> None:
    case = random_case(torch.Generator().manual_seed(0))
    whole = replace(case, mask=None)
    values = [TERMS["D"][1](case)] + [TERMS[name][1](whole) for name in "RVBK"]
    total, terms = evaluate(case, WEIGHTS)
    assert list(terms) == ["distance", "curvature", "volume_change", "mask_distance", "keypoint_distance"]
    torch.testing.assert_close(torch.stack(list(terms.values())), torch.stack(values))
    expected = sum(w * v for w, v in zip((1.0, 3.0, 0.5, 2.0, 0.25), values, strict=True))
    torch.testing.assert_close(total, expected)


def test_objective_leaves_out_terms_without_weight() -> None:
    case = random_case(torch.Generator().manual_seed(0))
    off = replace(WEIGHTS, alpha=0.0, beta=0.0, gamma=0.0, delta=0.0)
    total, terms = objective(case.displacement, case.grid, off, TERMS["D"][1](case))
    assert list(terms) == ["distance"] and terms["distance"] == total


def test_objective_of_a_batch_in_single_precision_has_gradients() -> None:
    noise = torch.Generator().manual_seed(0)
    pair = [random_case(noise), random_case(noise)]
    labels = {name: torch.cat([getattr(c, name) for c in pair]).float() for name in ("fixed_labels", "warped_labels")}
    displacement = torch.cat([c.displacement for c in pair]).float().requires_grad_()
    distance = torch.stack([TERMS["D"][1](c) for c in pair]).mean().float()
    points = [Keypoints(c.fixed_mm, c.moving_mm, torch.ones(8)) for c in pair]
    total, terms = objective(displacement, GRID, WEIGHTS, distance, **labels, keypoints=points)
    total.backward()
    assert total.dtype == torch.float32 and displacement.grad is not None
    assert torch.isfinite(displacement.grad).all() and (displacement.grad != 0).any(dim=(1, 2, 3, 4)).all()
    assert not any(value.requires_grad for value in terms.values())
    singles = torch.stack([evaluate(c, WEIGHTS)[0] for c in pair]).mean()
    assert float(total.detach()) == pytest.approx(float(singles), rel=1e-4)


def test_objective_refuses_a_weight_with_nothing_to_work_on() -> None:
    case = random_case(torch.Generator().manual_seed(0))
    distance = TERMS["D"][1](case)
    with pytest.raises(InputError, match="no labels"):
        objective(case.displacement, case.grid, WEIGHTS, distance)
    with pytest.raises(InputError, match="no keypoints"):
        objective(case.displacement, case.grid, replace(WEIGHTS, beta=0.0), distance)
    with pytest.raises(ValueError, match="expected a volume of shape"):
        objective(case.displacement, case.grid, replace(WEIGHTS, beta=0.0), distance, keypoints=[])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1.0),
        ("beta", float("nan")),
        ("delta", float("inf")),
        ("t", 0.0),
        ("t", 1.0),
        ("diffusion", -1.0),
    ],
)
def test_weights_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="expected a"):
        Weights(**{name: value})


def test_weights_are_stored_as_plain_numbers() -> None:
    assert Weights(**asdict(WEIGHTS)) == WEIGHTS
