"""Adam against PyTorch's own, with a step that falls linearly."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithm.objective.adam import LAST_STEP, Adam
from tests.support.strategies import examples


def value(unknown: torch.Tensor, scale: float) -> torch.Tensor:
    """A narrow valley, other in every element."""
    weights = torch.linspace(0.1, 30, unknown.numel()).reshape(unknown.shape)
    return scale * (weights * (unknown - 1).square()).sum() + (unknown[0] * unknown[1]).sum()


@given(st.integers(0, 2**31), st.floats(1e-6, 100), st.integers(1, 40), st.sampled_from([1e-8, 3e-6]))
@examples(25)
def test_the_numbers_of_pytorch(seed: int, scale: float, steps: int, epsilon: float) -> None:
    start = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    adam = Adam(ours, 0.3, steps, epsilon)
    reference = torch.optim.Adam([theirs], lr=0.3, eps=epsilon)
    schedule = torch.optim.lr_scheduler.LinearLR(reference, 1.0, LAST_STEP, steps)
    for _ in range(steps):
        adam.descend(value(ours, scale))
        reference.zero_grad()
        value(theirs, scale).backward()
        reference.step()
        schedule.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_finds_the_minimum() -> None:
    unknown = torch.full((2, 3, 3), 5.0, requires_grad=True)
    adam = Adam(unknown, 0.5, 200)
    for _ in range(200):
        adam.descend((unknown - torch.arange(18.0).reshape(2, 3, 3)).square().sum())
    assert (unknown - torch.arange(18.0).reshape(2, 3, 3)).abs().max() < 0.02


@pytest.mark.parametrize(
    "module", ["algorithm.registration", "algorithm.preparation.prealign", "algorithm.refinement.refine"]
)
def test_pytorchs_compiler_is_not_loaded(module: str) -> None:
    """It takes a second, and comes with the first of PyTorch's own optimisers."""
    code = f"import sys, torch, {module}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
