"""The organs as analytic surfaces, at the inhale reference position.

Chest coordinates are in mm, LPS (x to the left, y to the back, z to the head), with the origin in the middle of the
chest. Every ``*_depth`` is positive inside and zero on the surface. To first order, it is the distance to the surface
in mm.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Lungs = Literal["both", "left", "right"]
Points = Float[Tensor, "n 3"]
Scalars = Float[Tensor, " n"]

HEART = ((22.0, -18.0, -42.0), (54.0, 44.0, 46.0))
LUNG_APEX_MM, LUNG_BASE_MM = 112.0, -108.0
OBLIQUE_SLOPE = 0.93
SPINE_Y_MM = 64.0


def trunk_depth(points: Points) -> Scalars:
    """Depth under the skin: an ellipse-like tube of 276 × 216 mm, narrower at the shoulders."""
    x, y, z = points.unbind(1)
    half_width = 138 - 14 * torch.sigmoid((z - 100) / 12)
    return _depth((x.abs(), half_width, 4), ((y - 2).abs(), 108.0, 2))


def cavity_depth(points: Points) -> Scalars:
    """Depth in the thoracic and abdominal cavity: a slight barrel with a dome. The spine is outside."""
    x, y, z = points.unbind(1)
    barrel = 1 - ((z + 40) / 600) ** 2
    width, depth, dome = (x.abs() - 28).clamp(min=0), (y + 1).abs(), (z - 20).clamp(min=0)
    tube = _depth((width, 84 * barrel, 2), (depth, 82 * barrel, 2), (dome, 95.0, 2))
    spine = (x**2 + (y - SPINE_Y_MM - 2) ** 2).sqrt() - 22
    return _smooth_min(tube, spine, 6.0)


def diaphragm_height(points: Points) -> Scalars:
    """Height above the diaphragm: two domes, of which the right one is higher. Both are lower at the back."""
    x, y, z = points.unbind(1)
    across = ((y + 5) / 75) ** 2
    right = -36 - 44 * (((x + 58) / 56) ** 2 + across)
    left = -48 - 40 * (((x - 58) / 56) ** 2 + across)
    return (z + _smooth_min(-right, -left, 12.0) + 0.2 * y) / 1.35


def heart_depth(points: Points) -> Scalars:
    """Depth in the heart, an ellipsoid."""
    centre, axes = (torch.tensor(v, dtype=points.dtype) for v in HEART)
    scaled = (points - centre) / axes
    radius, slope = scaled.square().sum(1).sqrt(), (scaled / axes).square().sum(1).sqrt()
    depth: Tensor = (1 - radius) * radius / (slope + 1e-4)
    return depth


def lung_depth(points: Points, lungs: Lungs = "both") -> Scalars:
    """Depth in the lungs: the cavity without mediastinum and heart, above the diaphragm."""
    x, y, z = points.unbind(1)
    mediastinum = 8 + 17 * torch.sigmoid((y + 40) / 10) + 3 * torch.sin(z / 20 + y / 45)
    beside = x.abs() - mediastinum
    if lungs != "both":
        beside = (x if lungs == "left" else -x) - mediastinum
    inner = _smooth_min(_smooth_min(beside, -heart_depth(points), 10.0), diaphragm_height(points), 5.0)
    return _smooth_min(inner, cavity_depth(points), 3.0)


def oblique_height(points: Points) -> Scalars:
    """Distance above the oblique fissure (negative: the lower lobe), a wavy sheet that falls to the front."""
    x, y, z = points.unbind(1)
    wave = 5 * torch.sin(y / 38 + 0.02 * x) + 4 * torch.sin(x / 30)
    return (z + 8 - OBLIQUE_SLOPE * y - wave) / math.hypot(1, OBLIQUE_SLOPE)


def horizontal_height(points: Points) -> Scalars:
    """Distance above the horizontal fissure of the right lung (negative: the middle lobe)."""
    x, y, z = points.unbind(1)
    return z - 4 - 4 * torch.sin(x / 25) - 3 * torch.cos(y / 28)


def lobes(points: Points, lungs: Lungs = "both") -> UInt8[Tensor, " n"]:
    """1 left upper, 2 left lower, 3 right upper, 4 right middle, 5 right lower, 0 elsewhere."""
    left, lower = points[:, 0] > 0, oblique_height(points) < 0
    right = torch.where(lower, 5, torch.where(horizontal_height(points) < 0, 4, 3))
    label = torch.where(left, torch.where(lower, 2, 1), right)
    return torch.where(lung_depth(points, lungs) > 0, label, 0).to(torch.uint8)


def fissure_distance(points: Points) -> Scalars:
    """Distance to the nearest fissure: oblique in both lungs, horizontal in the right lung in front of the oblique."""
    oblique = oblique_height(points)
    horizontal = torch.where((points[:, 0] < 0) & (oblique > 0), horizontal_height(points).abs(), torch.inf)
    return torch.minimum(oblique.abs(), horizontal)


def _depth(*terms: tuple[Tensor, Tensor | float, int]) -> Scalars:
    """(1 - f) / |∇f| for f = Σ (s/a)^p over terms (s ≥ 0, a, p): the distance to f = 1, to first order."""
    value = torch.zeros_like(terms[0][0])
    slope = torch.zeros_like(value)
    for s, a, p in terms:
        lower = (s / a) ** (p - 1)
        value += lower * (s / a)
        slope += (p / a * lower) ** 2
    return (1 - value) / (slope.sqrt() + 2e-3)


def _smooth_min(a: Tensor, b: Tensor, width: float) -> Tensor:
    """Minimum with a rounded edge where |a - b| < width (the quadratic polynomial of Quilez)."""
    blend = (0.5 + (b - a) / (2 * width)).clamp(0, 1)
    return torch.lerp(b, a, blend) - width * blend * (1 - blend)
