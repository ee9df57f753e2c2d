"""HU of the CT at a reference point: lungs, vessels, airways, organs, bones and fat."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, displacement_at
from phantom import shapes
from phantom.shapes import Lungs, Points, Scalars
from phantom.trees import Branches, Tubes, grow_tree, joined

AIR, FAT, FLUID, BLOOD, MUSCLE, LIVER, DISC, CARTILAGE, MARROW, BONE = -1000, -95, 12, 45, 50, 60, 90, 100, 220, 520
TABLE_Y_MM, TABLE_HU = 115.0, -250
CARINA = (0.0, 14.0, 38.0)
TEXTURE_SCALES_MM = {5.0: 26.0, 11.0: 20.0, 35.0: 15.0}
"""Standard deviation in HU of the parenchyma's random texture, by lattice spacing in mm."""


@dataclass(frozen=True)
class Anatomy:
    """One random chest at the reference position (inhale), in chest coordinates."""

    lungs: Lungs
    inhale_hu: float
    opacity_mm: float
    vessels: Tubes
    airways: Tubes
    bifurcations: Float[np.ndarray, "f 3"]
    texture: list[tuple[Tensor, Grid]]

    def core_hu(self, points: Points, density: Scalars, voxel_mm: float) -> Scalars:
        """HU of lungs, mediastinum and abdomen. The lung tissue is ``density`` times as dense as at inhale."""
        shade = sum((displacement_at(points, *lattice)[:, 0] for lattice in self.texture), start=torch.tensor(0.0))
        depth = shapes.lung_depth(points, self.lungs)
        hu = self._organs(points, shade, voxel_mm)
        hu = torch.lerp(hu, self._parenchyma(points, shade, density, voxel_mm), filled(depth, voxel_mm))
        near = depth > -8
        hu[near] = torch.lerp(hu[near], hu.new_tensor(BLOOD), self.vessels.occupancy(points[near], voxel_mm))
        hu = self._consolidated(points, hu, depth, voxel_mm)
        hu = torch.lerp(hu, hu.new_tensor(MUSCLE), self.airways.occupancy(points, voxel_mm, wall=0.25))
        return torch.lerp(hu, hu.new_tensor(AIR), self.airways.occupancy(points, voxel_mm))

    def cage_hu(self, points: Points, voxel_mm: float) -> Scalars:
        """HU of skin, fat, muscle and bones, and of the air around the chest; muscle in the cavity."""
        x, y, z = points.unbind(1)
        trunk, cavity = shapes.trunk_depth(points), shapes.cavity_depth(points)
        hu = torch.full_like(x, float(MUSCLE))
        hu = torch.lerp(hu, hu.new_tensor(FAT), filled(-15 - cavity, voxel_mm))
        hu = torch.lerp(hu, hu.new_tensor(MUSCLE), filled(2 - trunk, voxel_mm))  # skin
        # ribs fall towards the front; behind the breast bone they are cartilage
        across = torch.remainder(z - 0.45 * y, 27.0) - 13.5
        rib = 5.5 - (across**2 + (1.3 * (cavity + 8)) ** 2).sqrt()
        bone = torch.where(y < -66, float(CARTILAGE), torch.where(rib > 2, 350.0, float(BONE)))
        hu = torch.lerp(hu, bone, filled(torch.where(z < 100, rib, -99.0), voxel_mm))
        sternum = torch.minimum(4 - (cavity + 8).abs(), torch.minimum(14 - x.abs(), 50 - (z - 20).abs()))
        hu = torch.lerp(hu, hu.new_tensor(MARROW), filled(torch.where(y < 0, sternum, -99.0), voxel_mm))
        hu = self._spine(points, hu, voxel_mm)
        return torch.lerp(hu.new_tensor(AIR), hu, filled(trunk, voxel_mm))

    def _spine(self, points: Points, hu: Scalars, voxel_mm: float) -> Scalars:
        x, y, z = points.unbind(1)
        body = 17 - (x**2 + (y - shapes.SPINE_Y_MM) ** 2).sqrt()
        disc = 3 - (torch.remainder(z, 26.0) - 13).abs()
        vertebra = torch.where(torch.minimum(body, -disc) > 2.5, float(MARROW), float(BONE))
        hu = torch.lerp(hu, torch.lerp(vertebra, hu.new_tensor(DISC), filled(disc, voxel_mm)), filled(body, voxel_mm))
        arch = torch.minimum(4 + 14 * torch.exp(-(((y - 80) / 6) ** 2)) - x.abs(), 12 - (y - 88).abs())
        hu = torch.lerp(hu, hu.new_tensor(BONE), filled(torch.minimum(arch, -disc), voxel_mm))
        canal = 7 - (x**2 + (y - shapes.SPINE_Y_MM - 23) ** 2).sqrt()
        return torch.lerp(hu, hu.new_tensor(FLUID), filled(canal, voxel_mm))

    def _organs(self, points: Points, shade: Scalars, voxel_mm: float) -> Scalars:
        """Heart, aorta and great vessels in fat; liver, spleen and stomach below the diaphragm."""
        x, y, z = points.unbind(1)
        hu = FAT + 0.2 * shade
        aorta = 12 - ((x - 20) ** 2 + (y - 44) ** 2).sqrt()
        trunks = 15 - (x.abs() ** 2 + (y + 12) ** 2).sqrt() + torch.where(z > 0, 0.0, z)
        for organ in (shapes.heart_depth(points), aorta, trunks):
            hu = torch.lerp(hu, BLOOD + 0.1 * shade, filled(organ, voxel_mm))
        left = torch.sigmoid(x / 6)
        abdomen = LIVER - 25 * left + (0.15 + left) * 0.8 * shade
        return torch.lerp(hu, abdomen, filled(-shapes.diaphragm_height(points), voxel_mm))

    def _parenchyma(self, points: Points, shade: Scalars, density: Scalars, voxel_mm: float) -> Scalars:
        """HU of textured tissue, denser at the back (gravity), with fissures. (HU + 1000) is a conserved density."""
        tissue = (self.inhale_hu - AIR + 0.2 * points[:, 1] + shade).clamp(min=20) * density + AIR
        sheet_mm = 1.2
        width = max(sheet_mm, voxel_mm)
        sheet = torch.exp(-((2 * shapes.fissure_distance(points) / width) ** 2)) * sheet_mm / width
        return torch.lerp(tissue, tissue.new_tensor(FLUID), 0.7 * sheet)

    def _consolidated(self, points: Points, hu: Scalars, depth: Scalars, voxel_mm: float) -> Scalars:
        """HU with fluid in the lower back of the right lung (of the left lung, if it is the only one)."""
        if self.opacity_mm <= 0:
            return hu
        x, y, z = points.unbind(1)
        side = x if self.lungs == "left" else -x
        level = self.opacity_mm - 0.7 * (z - shapes.LUNG_BASE_MM) + 0.7 * (y - 70)
        inside = filled(torch.minimum(level, torch.minimum(side, depth + voxel_mm)), voxel_mm)
        return torch.lerp(hu, hu.new_tensor(FLUID), inside)


def grow_anatomy(seed: int, lungs: Lungs, inhale_hu: float, opacity_mm: float, voxel_mm: float) -> Anatomy:
    """The chest of this seed, without details that are too small for voxels of ``voxel_mm``."""
    rng = np.random.default_rng((seed, 0))
    vessels, forks, airways = [], [], [_central_airways(lungs)]
    spacing = max(10.0, 3.2 * voxel_mm)
    for label in range(1, 6):
        side = 1.0 if label <= 2 else -1.0
        # arteries enter above and in front, veins below and in front of the bronchus
        for offset in ((0.0, -8.0, 7.0), (0.0, -10.0, -12.0)):
            targets = lobe_targets(label, lungs, spacing, rng)
            tree, bifurcations = grow_tree(_hilum(side) + np.array(offset), targets, 0.065 * spacing)
            vessels.append(tree)
            forks.append(bifurcations)
        airways.append(grow_tree(_hilum(side), lobe_targets(label, lungs, 2.5 * spacing, rng), 0.9)[0])
    step = min(1.0, voxel_mm / 3)
    return Anatomy(
        lungs=lungs,
        inhale_hu=inhale_hu,
        opacity_mm=opacity_mm,
        vessels=Tubes(joined(vessels), step),
        airways=Tubes(joined(airways), step),
        bifurcations=np.concatenate(forks),
        texture=[_lattice(max(mm, 1.8 * voxel_mm), sd, rng) for mm, sd in TEXTURE_SCALES_MM.items()],
    )


def table_hu(points: Points, voxel_mm: float) -> Scalars:
    """HU of the table: a slightly hollow slab under the back, 6 mm thick; air elsewhere."""
    x, y, _ = points.unbind(1)
    depth = torch.minimum(3 - (y - TABLE_Y_MM + (x / 60) ** 2).abs(), 140 - x.abs())
    return AIR + (TABLE_HU - AIR) * filled(depth, voxel_mm)


def lobe_targets(label: int, lungs: Lungs, spacing_mm: float, rng: np.random.Generator) -> Float[np.ndarray, "t 3"]:
    """About one point per ``spacing_mm``³ of a lobe: a jittered lattice, with a distance to pleura and fissures."""
    axes = [np.arange(-half, half, spacing_mm) for half in (115.0, 85.0, 115.0)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    points += rng.uniform(0, spacing_mm, size=(1, 3)) + rng.uniform(-0.4, 0.4, size=points.shape) * spacing_mm
    place = torch.from_numpy(points)
    clear = (shapes.lung_depth(place, lungs) > 4) & (shapes.fissure_distance(place) > 2.5)
    chosen: Float[np.ndarray, "t 3"] = points[(clear & (shapes.lobes(place, lungs) == label)).numpy()]
    return chosen


def _hilum(side: float) -> Float[np.ndarray, " 3"]:
    return np.array([33.0 * side, 12.0, 14.0])


def _central_airways(lungs: Lungs) -> Branches:
    """Trachea and main bronchi."""
    sides = {"both": (1.0, -1.0), "left": (1.0,), "right": (-1.0,)}[lungs]
    trachea = ((0.0, 4.0, 170.0), CARINA)
    ends = [trachea, *((CARINA, tuple(_hilum(side))) for side in sides)]
    start, end = (np.array([e[k] for e in ends]) for k in (0, 1))
    return Branches(start, end, np.array([8.0] + [6.0] * len(sides)))


def _lattice(spacing_mm: float, sd_hu: float, rng: np.random.Generator) -> tuple[Tensor, Grid]:
    """Random values on a lattice around the chest, for trilinear interpolation."""
    x, y, z = (int(np.ceil(n / spacing_mm)) + 2 for n in (340.0, 280.0, 380.0))
    grid = Grid((x, y, z), (spacing_mm,) * 3, (-170.0, -140.0, -190.0))
    values = torch.from_numpy(rng.normal(0, 1.6 * sd_hu, size=(1, 1, *grid.shape)).astype(np.float32))
    return values.expand(-1, 3, -1, -1, -1).contiguous(), grid


def filled(depth: Tensor, voxel_mm: float) -> Tensor:
    """Share of a voxel that is inside a surface at this depth (partial volume)."""
    return (0.5 + depth / voxel_mm).clamp(0, 1)
