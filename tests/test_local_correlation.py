"""Local squared correlation against brute force, and what it must not see."""

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithm.objective.local_correlation import local_correlation_distance

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 1, 5, 6, 7)


@pytest.fixture
def images() -> tuple[Tensor, Tensor, Tensor]:
    """Fixed, warped (HU, float64) and a mask that leaves some voxels out."""
    generator = torch.Generator().manual_seed(0)
    fixed, noise, chance = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    return 100 * fixed - 800, 60 * fixed + 50 * noise - 700, chance > -1


@pytest.mark.parametrize("window", [3, 5])
def test_is_that_of_a_loop_over_the_windows(images: tuple[Tensor, Tensor, Tensor], window: int) -> None:
    fixed, warped, mask = images
    half, values = window // 2, []
    for z, y, x in mask[0, 0].nonzero().tolist():
        box = tuple(slice(max(0, i - half), i + half + 1) for i in (z, y, x))
        f, w = fixed[0, 0][box].numpy().ravel(), warped[0, 0][box].numpy().ravel()
        covariance = np.cov(f, w, bias=True)
        values.append(1 - covariance[0, 1] ** 2 / ((covariance[0, 0] + 400) * (covariance[1, 1] + 400)))
    distance = local_correlation_distance(fixed, warped, mask, window, noise_hu=20.0)
    assert float(distance) == pytest.approx(np.mean(values), rel=1e-9)


def test_brightness_contrast_and_its_sign_do_not_matter(images: tuple[Tensor, Tensor, Tensor]) -> None:
    fixed, warped, mask = images
    plain = local_correlation_distance(fixed, warped, mask, noise_hu=0.0)
    changed = local_correlation_distance(fixed, 300 - 2.5 * warped, mask, noise_hu=0.0)
    assert float(changed) == pytest.approx(float(plain), rel=1e-9)


def test_from_0_for_equal_images_to_1_for_flat_ones(images: tuple[Tensor, Tensor, Tensor]) -> None:
    fixed, warped, mask = images
    assert float(local_correlation_distance(fixed, fixed, mask, noise_hu=0.0)) == pytest.approx(0, abs=1e-9)
    assert 0 < float(local_correlation_distance(fixed, warped, mask)) < 1
    assert float(local_correlation_distance(fixed, torch.full_like(fixed, -800.0), mask)) == pytest.approx(1)


def test_only_the_mask_counts_and_an_empty_one_gives_0(images: tuple[Tensor, Tensor, Tensor]) -> None:
    fixed, warped, _ = images
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    assert float(local_correlation_distance(fixed, warped, mask)) == 0
    mask[..., :2] = True
    beyond = warped.clone()
    beyond[..., 3:] += 500 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[..., 3:]
    assert local_correlation_distance(fixed, beyond, mask) == local_correlation_distance(fixed, warped, mask)


def test_gradient(images: tuple[Tensor, Tensor, Tensor]) -> None:
    fixed, warped, mask = images
    variable = warped.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: local_correlation_distance(fixed, w, mask), (variable,))
