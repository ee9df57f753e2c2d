"""The optimiser: Muon against an SVD, Adam against torch's own, and a resumed run against the uninterrupted one."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from algorithm.cascade.network import UNet
from tests.support.strategies import examples
from training.optimiser import WARM_UP, Optimiser

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 3e-3
STEPS = 100


def network(seed: int = 0) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet((4, 8))


def kernels(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The convolutions but the last."""
    return {name: p for name, p in unet.named_parameters() if p.ndim == 5 and not name.startswith("last")}


def values(unet: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def gradients(unet: nn.Module, seed: int, norm: float = 0.5) -> dict[str, Tensor]:
    """Ill-conditioned ones (as matrices, singular values fall to a twentieth), together of length ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, p in unet.named_parameters():
        matrix = torch.randn(len(p), p[0].numel(), generator=generator)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        result[name] = (u * torch.logspace(0, -1.3, len(s)) @ v).view_as(p)
    length = torch.cat([g.flatten() for g in result.values()]).norm()
    return {name: g * (norm / length) for name, g in result.items()}


def linear_loss(unet: nn.Module, gradient: dict[str, Tensor]) -> Tensor:
    """A loss with this gradient."""
    return torch.stack([(p * gradient[name]).sum() for name, p in unet.named_parameters() if name in gradient]).sum()


def image_loss(unet: nn.Module, step: int) -> Tensor:
    """Some loss of the network that differs from step to step."""
    images = torch.rand(1, 2, 6, 4, 4, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (unet(images) - images[:, :1]).square().mean()
    return loss


def rate(step: int, steps: int = STEPS) -> float:
    """A linear rise, then a cosine from 1 to 0.1."""
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
    return cosine * (step + 1) / 20 if step < 20 else cosine


# --- Muon ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
@examples(3)
def test_kernels_move_by_the_nearest_orthogonal_matrix_of_the_nesterov_momentum(seed: int) -> None:
    """With momentum b ← 0.95 b + 0.05 g: -0.2 · rate · √max(rows, columns) · U Vᵀ, where U S Vᵀ = 0.05 g + 0.95 b.

    The Newton-Schulz iteration leaves singular values of about 0.7 to 1.2 in the place of ones, so U and V are tested.
    """
    unet = network()
    optimiser = Optimiser(unet, RATE, STEPS)
    momentum = {name: torch.zeros_like(p) for name, p in kernels(unet).items()}
    for step in range(3):
        before, gradient = values(unet), gradients(unet, seed + step)
        optimiser.step(linear_loss(unet, gradient))
        for name, p in kernels(unet).items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient[name]
            nesterov = (0.05 * gradient[name] + 0.95 * momentum[name]).flatten(1)
            u, _, v = torch.linalg.svd(nesterov, full_matrices=False)
            scale = 0.2 * math.sqrt(max(nesterov.shape)) * RATE * rate(step)
            change = -(p.detach() - before[name]).flatten(1) / scale
            core = u.T @ change @ v.T
            assert 0.65 < core.diagonal().min() <= core.diagonal().max() < 1.2, name
            torch.testing.assert_close(core, core.diagonal().diag(), atol=0.06, rtol=0)  # bfloat16
            torch.testing.assert_close(change, u @ core @ v, atol=0.03, rtol=0)


def test_only_the_kernels_before_the_last_layer_are_orthogonalised() -> None:
    """Everything else moves as under Adam alone."""
    unet, reference = network(), network()
    optimiser = Optimiser(unet, RATE, STEPS)
    others = [p for name, p in reference.named_parameters() if name not in kernels(reference)]
    adam = torch.optim.Adam(others, lr=RATE)
    for step in range(3):
        gradient = gradients(unet, step)
        optimiser.step(linear_loss(unet, gradient))
        for name, p in reference.named_parameters():
            p.grad = gradient[name]
        adam.param_groups[0]["lr"] = RATE * rate(step)
        adam.step()
    found, start, expected = values(unet), values(network()), values(reference)
    assert {name for name in found if name not in kernels(unet)} >= {"last.weight", "last.bias", "up.0.bias"}
    for name in found:
        assert not torch.equal(found[name], start[name]), name
        if name not in kernels(unet):
            torch.testing.assert_close(found[name], expected[name], atol=1e-8, rtol=1e-6)


def test_parameters_without_a_gradient_stay() -> None:
    unet = network()
    before = values(unet)
    Optimiser(unet, RATE, STEPS).step(unet.last.weight.square().sum())
    assert [name for name, value in values(unet).items() if not torch.equal(value, before[name])] == ["last.weight"]


def test_gradients_do_not_add_up_over_steps() -> None:
    """Two steps down the same gradient keep the direction of the first: none is left over from another loss."""
    unet = network()
    optimiser = Optimiser(unet, RATE, STEPS)
    one, other = gradients(unet, 0), gradients(unet, 1)
    optimiser.step(linear_loss(unet, one))
    optimiser.step(linear_loss(unet, other))
    for name, p in unet.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, other[name])


# --- Adam alone ------------------------------------------------------------------------------------------------------


def test_without_muon_it_is_torch_s_adam_with_the_same_schedule() -> None:
    unet, reference = network(), network()
    optimiser = Optimiser(unet, 1e-3, 30, muon=False)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-3)
    for step in range(30):
        optimiser.step(50 * image_loss(unet, step))  # long gradients
        adam.zero_grad()
        (50 * image_loss(reference, step)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adam.param_groups[0]["lr"] = 1e-3 * rate(step, 30)
        adam.step()
    for name, value in values(unet).items():
        torch.testing.assert_close(value, values(reference)[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [(0.3, 0.3), (1.0, 1.0), (40.0, 1.0)])
@pytest.mark.parametrize("muon", [True, False])
def test_long_gradients_are_cut_at_one(norm: float, expected: float, muon: bool) -> None:
    unet = network()
    gradient = gradients(unet, 0, norm)
    Optimiser(unet, RATE, STEPS, muon).step(linear_loss(unet, gradient))
    found = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    for name, value in found.items():
        torch.testing.assert_close(value, gradient[name] * (expected / norm), atol=1e-6, rtol=1e-4)


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [True, False])
def test_the_rate_rises_then_falls_to_a_tenth(muon: bool) -> None:
    """Seen from outside: under a constant gradient Adam moves a bias by just the learning rate."""
    unet = network()
    optimiser = Optimiser(unet, RATE, STEPS, muon)
    gradient = gradients(unet, 0)
    moved = []
    for _ in range(STEPS + 1):
        before = unet.last.bias.detach().clone()
        optimiser.step(linear_loss(unet, gradient))
        moved.append(float((unet.last.bias.detach() - before).abs().max()) / RATE)
    assert moved == pytest.approx([rate(step) for step in range(STEPS + 1)], rel=0.01)
    assert WARM_UP == 20
    assert moved[0] == pytest.approx(1 / 20, rel=0.01)
    assert moved[19] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.19 * math.pi)), rel=0.01)
    assert max(moved) == moved[19]
    assert moved[STEPS] == pytest.approx(0.1, rel=0.01)
    assert len({part.param_groups[0]["lr"] for part in optimiser._parts}) == 1  # Muon's is Adam's


def test_a_level_of_no_steps_has_an_optimiser_all_the_same() -> None:
    Optimiser(network(), RATE, 0)


# --- state -----------------------------------------------------------------------------------------------------------


def through_a_file(state: list) -> list:
    """As the checkpoint stores it: no code is unpickled."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: list = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("stop", [1, 4, 25])
def test_a_resumed_run_is_the_uninterrupted_one(muon: bool, stop: int) -> None:
    whole, part, resumed = network(), network(), network(7)
    uninterrupted, first = (Optimiser(unet, RATE, 30, muon) for unet in (whole, part))
    for step in range(30):
        uninterrupted.step(image_loss(whole, step))
    for step in range(stop):
        first.step(image_loss(part, step))
    resumed.load_state_dict(part.state_dict())
    second = Optimiser(resumed, RATE, 30, muon)
    second.load_state_dict(through_a_file(first.state_dict()))
    for step in range(stop, 30):
        second.step(image_loss(resumed, step))
    for name, value in values(whole).items():
        assert torch.equal(value, values(resumed)[name]), name


def test_without_its_state_a_resumed_run_would_differ() -> None:
    whole, resumed = network(), network(7)
    optimiser = Optimiser(whole, RATE, 30)
    for step in range(4):
        optimiser.step(image_loss(whole, step))
    resumed.load_state_dict(whole.state_dict())
    for unet, one in ((whole, optimiser), (resumed, Optimiser(resumed, RATE, 30))):
        one.step(image_loss(unet, 4))
    differing = [name for name, value in values(whole).items() if not torch.equal(value, values(resumed)[name])]
    assert set(kernels(whole)) <= set(differing)


def loads(unet: nn.Module, other: nn.Module) -> None:
    unet.load_state_dict(other.state_dict())


def copies(unet: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(unet.parameters(), other.parameters(), strict=True):
            p.copy_(q)


@pytest.mark.parametrize("change", [loads, copies])
def test_the_optimiser_goes_on_from_parameters_loaded_after_it_was_made(
    change: Callable[[nn.Module, nn.Module], None],
) -> None:
    """Muon's matrices share their memory with the kernels."""
    unet, other = network(), network(3)
    optimiser = Optimiser(unet, RATE, STEPS)
    change(unet, other)
    before = values(unet)
    optimiser.step(linear_loss(unet, gradients(unet, 0)))
    for name, value in values(unet).items():
        moved = (value - before[name]).abs().max()
        assert 0 < moved < 0.2 * RATE * rate(0) * 50, name  # one step from there, not back to the old parameters
    for kernel, matrix in optimiser._matrices:
        assert matrix.data_ptr() == kernel.data_ptr()
        assert torch.equal(matrix.view_as(kernel), kernel)
