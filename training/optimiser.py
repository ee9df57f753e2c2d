"""Muon for the convolutions, Adam for the other parameters: here this learns faster than Adam alone.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix. The kernels of a
convolution are such a matrix: output channels × (input channels · taps). Norms, biases and the last layer use Adam.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 20
"""Number of steps in which the learning rate rises at the start."""


class Optimiser:
    """Optimiser of one U-Net over ``steps`` steps. The learning rate rises briefly, then a cosine falls to a tenth."""

    def __init__(self, network: nn.Module, learning_rate: float, steps: int, muon: bool = True) -> None:
        # the last layer has three outputs
        kernels = [p for p in network.parameters() if p.ndim == 5 and p.shape[0] > 3] if muon else []
        self._parameters = list(network.parameters())
        self._matrices = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in kernels]  # views of the same memory
        others = [p for p in self._parameters if all(p is not kernel for kernel in kernels)]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=learning_rate)]
        if kernels:
            matrices = [matrix for _, matrix in self._matrices]
            self._parts.append(
                torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / max(steps, 1)))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate) for part in self._parts]

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of ``loss``. The gradient's length is limited to 1."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for kernel, matrix in self._matrices:
            matrix.grad = None if kernel.grad is None else kernel.grad.view_as(matrix)
        for part, schedule in zip(self._parts, self._schedules, strict=True):
            part.step()
            schedule.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state for the checkpoint."""
        return [part.state_dict() for part in self._parts] + [schedule.state_dict() for schedule in self._schedules]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        for part, values in zip(self._parts, state, strict=False):
            part.load_state_dict(values)
        for schedule, values in zip(self._schedules, state[len(self._parts) :], strict=True):
            schedule.load_state_dict(values)
