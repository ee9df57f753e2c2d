"""Breathing from inhale to exhale, with an exact inverse and with sliding at the pleura.

There are two smooth maps. The *core* (lungs, mediastinum, abdomen) rises with the diaphragm; the *cage* (chest wall,
ribs, spine, skin) does not. Both narrow the chest in the same way, so only tangential motion jumps across the pleura.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algorithm.errors import InputError
from phantom.shapes import LUNG_APEX_MM, LUNG_BASE_MM, Points, Scalars, cavity_depth

RESIDUAL_MM = 1e-3


@dataclass(frozen=True)
class Breathing:
    """Amplitudes (mm) of the motion from inhale to exhale."""

    diaphragm_mm: float
    """Rise of the lung base at the back."""
    chest_ap_mm: float
    """Backward motion of the front wall."""
    chest_lateral_mm: float
    """Inward motion of each side wall."""
    ribs_mm: float
    """Downward motion of the ribs at the front."""
    detail_mm: float
    """Root mean square of the irregular motion inside the cavity."""
    seed: int

    def core(self, points: Points) -> Points:
        """Displacement (mm) of lungs, mediastinum and abdomen; smooth, defined everywhere."""
        along_z = torch.stack([torch.zeros_like(points[:, 0])] * 2 + [self._rise(points)], 1)
        return self._narrowing(points) + along_z + self._detail(points)

    def cage(self, points: Points) -> Points:
        """Displacement (mm) of chest wall, ribs, spine and skin; smooth, defined everywhere.

        At the top, where the wall of the cavity is horizontal, it moves with the core, so that no gap opens there.
        """
        y, z = points[:, 1], points[:, 2]
        top = torch.sigmoid((z - 45) / 12)
        sinking = -self.ribs_mm * torch.sigmoid(-(y - 10) / 25)
        along_z = torch.stack([torch.zeros_like(points[:, 0])] * 2 + [torch.lerp(sinking, self._rise(points), top)], 1)
        return self._narrowing(points) + along_z

    def to_exhale(self, points: Points) -> Points:
        """Exhale positions of inhale points."""
        in_core = cavity_depth(points)[:, None] > 0
        return points + torch.where(in_core, self.core(points), self.cage(points))

    def core_to_inhale(self, points: Points) -> Points:
        """Inverse of x + core(x); InputError if the iteration does not converge."""
        return _invert(self.core, points)

    def cage_to_inhale(self, points: Points) -> Points:
        """Inverse of x + cage(x); InputError if the iteration does not converge."""
        return _invert(self.cage, points)

    def _rise(self, points: Points) -> Scalars:
        """Upward motion with the diaphragm: zero at the apex, largest at the base and at the back."""
        x, y, z = points.unbind(1)
        below_apex = ((LUNG_APEX_MM - z) / (LUNG_APEX_MM - LUNG_BASE_MM)).clamp(0, 1)
        posterior = 0.8 + 0.2 * torch.tanh(y / 50)
        lateral = 1 - 0.3 * torch.exp(-((x / 45) ** 2))
        return self.diaphragm_mm * torch.sin(math.pi / 2 * below_apex) ** 2 * posterior * lateral

    def _narrowing(self, points: Points) -> Points:
        """Inward and backward motion of the chest, which gets flatter and narrower, least at the top."""
        x, y, z = points.unbind(1)
        lower = 0.4 + 0.6 * torch.sigmoid((60 - z) / 25)
        inward = -self.chest_lateral_mm * lower * torch.tanh(x / 60)
        backward = self.chest_ap_mm * lower * torch.sigmoid(-(y + 15) / 25)
        return torch.stack([inward, backward, torch.zeros_like(z)], 1)

    def _detail(self, points: Points) -> Points:
        """Six plane waves of 70 to 130 mm. They fade out towards the pleura, where they would open gaps."""
        rng = np.random.default_rng((self.seed, 1))
        direction, swing = rng.normal(size=(2, 6, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        # orthogonal to the wave, so divergence-free: lung density stays near physiology
        swing -= (swing * direction).sum(1, keepdims=True) * direction
        swing /= np.linalg.norm(swing, axis=1, keepdims=True)
        wave = 2 * np.pi / rng.uniform(70, 130, size=(6, 1)) * direction
        phase = rng.uniform(0, 2 * np.pi, size=6)
        wave_t, swing_t, phase_t = (torch.tensor(a, dtype=points.dtype) for a in (wave, swing, phase))
        fade = (cavity_depth(points) / 30).clamp(0, 1)
        fade = self.detail_mm / math.sqrt(3) * fade**2 * (3 - 2 * fade)
        return fade[:, None] * (torch.sin(points @ wave_t.T + phase_t) @ swing_t)


def _invert(displacement: Callable[[Tensor], Tensor], points: Points, iterations: int = 60) -> Points:
    """x with x + displacement(x) = points, by x ← points - displacement(x). Converges where |∇ displacement| < 1."""
    x = points
    for _ in range(iterations):
        following = points - displacement(x)
        residual = (following - x).abs().max().item() if len(points) else 0.0
        x = following
        if residual < RESIDUAL_MM:
            return x
    raise InputError(
        f"the breathing motion cannot be inverted ({residual:.2g} mm left, {RESIDUAL_MM} mm expected): "
        "its amplitudes are too large"
    )
