"""Adam for one tensor: Kingma and Ba 2015, Algorithm 1, with a step that falls linearly.

The numbers are those of ``torch.optim.Adam`` with ``LinearLR``. Those load PyTorch's compiler when they are first
used, which takes about a second of every run.
"""

import math

import torch
from torch import Tensor

DECAY = 0.9, 0.999
"""Of the means of the gradient and of its square: β₁ and β₂."""
LAST_STEP = 0.1
"""The share of the first step that the last one comes to."""


class Adam:
    """Minimises over ``unknown``, a leaf that requires a gradient."""

    def __init__(self, unknown: Tensor, step: float, steps: int, epsilon: float = 1e-8) -> None:
        """``step``: length of the first step, in units of ``unknown``; ``steps``: how many there will be.

        ``epsilon`` is added to the root of the mean square: gradients far below it hardly move anything.
        """
        self.unknown, self.first, self.steps, self.epsilon = unknown, step, steps, epsilon
        self.done = 0
        self.mean, self.square = torch.zeros_like(unknown), torch.zeros_like(unknown)

    @torch.no_grad()
    def descend(self, value: Tensor) -> None:
        """One step along the gradient of ``value``, a scalar made of the unknown."""
        (gradient,) = torch.autograd.grad(value, self.unknown)
        step = self.first * (1 - (1 - LAST_STEP) * self.done / max(self.steps, 1))
        self.done += 1
        self.mean.lerp_(gradient, 1 - DECAY[0])
        self.square.mul_(DECAY[1]).addcmul_(gradient, gradient, value=1 - DECAY[1])
        unbiased = [1 - decay**self.done for decay in DECAY]
        root = (self.square.sqrt() / math.sqrt(unbiased[1])).add_(self.epsilon)
        self.unknown.addcdiv_(self.mean, root, value=-step / unbiased[0])
