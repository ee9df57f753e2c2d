"""Adam for one tensor: Kingma and Ba 2015, Algorithm 1, with a step size that decreases linearly.

The results are the same as with ``torch.optim.Adam`` and ``LinearLR``. These two load PyTorch's compiler at their first
use, which costs about a second in every run.
"""

import math

import torch
from torch import Tensor

DECAY = 0.9, 0.999
"""Decay rates of the means of the gradient and of its square: β₁ and β₂."""
LAST_STEP = 0.1
"""Size of the last step, as a share of the first."""


class Adam:
    """Minimisation over ``unknown``, a leaf tensor that requires a gradient."""

    def __init__(self, unknown: Tensor, step: float, steps: int, epsilon: float = 1e-8) -> None:
        """``step``: length of the first step, in units of ``unknown``; ``steps``: number of steps.

        ``epsilon`` is added to the root of the mean square: a much smaller gradient hardly changes the unknown.
        """
        self.unknown, self.first, self.steps, self.epsilon = unknown, step, steps, epsilon
        self.done = 0
        self.mean, self.square = torch.zeros_like(unknown), torch.zeros_like(unknown)

    @torch.no_grad()
    def descend(self, value: Tensor) -> None:
        """One step down the gradient of ``value``, a scalar computed from the unknown."""
        (gradient,) = torch.autograd.grad(value, self.unknown)
        step = self.first * (1 - (1 - LAST_STEP) * self.done / max(self.steps, 1))
        self.done += 1
        self.mean.lerp_(gradient, 1 - DECAY[0])
        self.square.mul_(DECAY[1]).addcmul_(gradient, gradient, value=1 - DECAY[1])
        unbiased = [1 - decay**self.done for decay in DECAY]
        root = (self.square.sqrt() / math.sqrt(unbiased[1])).add_(self.epsilon)
        self.unknown.addcdiv_(self.mean, root, value=-step / unbiased[0])
