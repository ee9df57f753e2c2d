"""Around the lungs the field is a smooth continuation of the one inside."""

import pytest
import torch
from torch import Tensor

from algorithm.cascade.extension import EDGE_VOX, SMOOTHING, extended
from algorithm.geometry import Grid, jacobian_determinant
from tests.support.made_up_lungs import positions

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((48, 40, 56), (2.0, 2.0, 2.0))


def ball() -> Tensor:
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in GRID.shape), indexing="ij")
    return ((x**2 + y**2 + z**2) < 0.3).float()[None, None]


def test_deep_in_the_lungs_the_field_stays_and_what_was_around_them_is_forgotten() -> None:
    lungs = ball()
    smooth = 0.1 * positions(GRID) - 4
    wild = 30 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    found, other = (extended(torch.where(lungs > 0.5, smooth, around), lungs) for around in (wild, -wild))
    depth = 2 * EDGE_VOX + 1
    deep = -torch.nn.functional.max_pool3d(-lungs, depth, stride=1, padding=depth // 2) > 0.5
    assert deep.sum() > 300
    torch.testing.assert_close(found[deep.expand_as(found)], smooth[deep.expand_as(found)])
    reach = 2 * (EDGE_VOX + 5 * SMOOTHING)
    far = torch.nn.functional.max_pool3d(lungs, 2 * (reach // 4) + 1, stride=1, padding=reach // 4) == 0
    assert far.sum() > 1000
    assert (found - other).abs()[far.expand_as(found)].mean() < 0.1 * (2 * wild).abs().mean()
    assert jacobian_determinant(found, GRID)[deep[:, 0]].min() > 0


def test_a_constant_field_goes_on_constant() -> None:
    constant = torch.tensor([3.0, -2.0, 40.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *GRID.shape).contiguous()
    torch.testing.assert_close(extended(constant, ball()), constant)
    far = torch.ones(1, 3, *GRID.shape, dtype=torch.bool)
    far[:, :, 3:-3, 3:-3, 3:-3] = False
    torch.testing.assert_close(extended(constant * ball(), ball())[far], constant[far])


def test_without_lungs_the_field_stays() -> None:
    field = torch.randn(1, 3, *GRID.shape)
    assert extended(field, torch.zeros(1, 1, *GRID.shape)) is field
