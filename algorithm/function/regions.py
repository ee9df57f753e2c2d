"""The regions that are measured separately: both lungs, each lung, and each lobe if lobes are given."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from imagefiles import ENDINGS

from ..errors import InputError
from ..files.images import read_volume
from ..geometry import Grid, warp
from ..lungs import LungMask
from ..lungs.segmentations import lobes_of_totalsegmentator
from ..lungs.sides import LEFT, RIGHT, left_and_right

LUNGS = "both lungs"
SIDES = {"right lung": RIGHT, "left lung": LEFT}
LOBES = {
    "left upper lobe": 1,
    "left lower lobe": 2,
    "right upper lobe": 3,
    "right middle lobe": 4,
    "right lower lobe": 5,
}
"""The labels of lungmask; those of TotalSegmentator follow in the same order."""


@dataclass(frozen=True)
class Labels:
    """The lung (`sides.RIGHT`, `sides.LEFT`, `sides.UNKNOWN`) and the lobe of voxels that lie in the lungs."""

    sides: UInt8[np.ndarray, " n"]
    lobes: UInt8[np.ndarray, " n"] | None = None
    """The lobe of each voxel; 0 where there is none."""

    def of(self, region: str) -> Bool[np.ndarray, " n"]:
        """Which voxels belong to a region; without lobes, none belong to a lobe."""
        if region == LUNGS:
            return np.ones(len(self.sides), bool)
        if region in SIDES:
            belongs: np.ndarray = self.sides == SIDES[region]
            return belongs
        return np.zeros(len(self.sides), bool) if self.lobes is None else self.lobes == LOBES[region]

    def names(self) -> Iterator[str]:
        """The regions that have voxels."""
        for region in (LUNGS, *SIDES, *LOBES):
            if self.of(region).any():
                yield region


@dataclass(frozen=True)
class Regions:
    """The lungs of one scan, divided into regions; each label map has its own grid."""

    sides: UInt8[Tensor, "1 1 z y x"]
    grid: Grid
    lobes: UInt8[Tensor, "1 1 zl yl xl"] | None = None
    lobes_grid: Grid | None = None

    def at(self, grid: Grid) -> tuple[Bool[np.ndarray, "z y x"], Labels]:
        """The lungs on another grid, by the nearest voxel, and the labels of these voxels."""
        sides = _nearest(self.sides, self.grid, grid)
        inside = sides > 0
        if self.lobes is None or self.lobes_grid is None:
            return inside, Labels(sides[inside])
        return inside, Labels(sides[inside], _nearest(self.lobes, self.lobes_grid, grid)[inside])


def _nearest(labels: Tensor, source: Grid, target: Grid) -> UInt8[np.ndarray, "z y x"]:
    found: np.ndarray = warp(labels.float(), source, None, target, fill=0.0, nearest=True)[0, 0].byte().numpy()
    return found


def regions_of(lungs: LungMask, lobes: Path | None = None) -> Regions:
    """The regions: right and left from the mask, the lobes from a file or folder of another program; InputError as in
    `read_lobes`."""
    sides = left_and_right(lungs)
    if lobes is None:
        return Regions(sides, lungs.grid)
    labels, grid = read_lobes(lobes)
    return Regions(sides, lungs.grid, torch.from_numpy(labels)[None, None], grid)


def read_lobes(path: Path) -> tuple[UInt8[np.ndarray, "z y x"], Grid]:
    """Lobe labels as in `LOBES`, from a file of lungmask, or TotalSegmentator's file with all labels or its folder.

    InputError if there is no lobe, or other content.
    """
    if path.is_dir():
        return _from_folder(path)
    labels, grid = read_volume(path)
    found = {int(label) for label in np.unique(labels) if label > 0}
    if found and found <= set(LOBES.values()):
        return labels.astype(np.uint8), grid
    theirs = lobes_of_totalsegmentator(labels)
    if not found & set(theirs):
        raise InputError(
            f"{path}: has the labels {', '.join(map(str, sorted(found)[:20])) or 'none but 0'}, expected lobes: "
            f"1 to {len(LOBES)} alone (lungmask), or TotalSegmentator's {theirs[0]} to {theirs[-1]}"
        )
    lobes = np.zeros(labels.shape, np.uint8)
    for label, their in enumerate(theirs, start=1):
        lobes[labels == their] = label
    return lobes, grid


def _from_folder(folder: Path) -> tuple[UInt8[np.ndarray, "z y x"], Grid]:
    """Lobe labels from a folder with one file per lobe, lung_upper_lobe_left and so on."""
    lobes: np.ndarray | None = None
    on: Grid | None = None
    for name, label in LOBES.items():
        side, part, _ = name.split()
        files = [path for path in folder.glob(f"lung_{part}_lobe_{side}.*") if path.name.endswith(tuple(ENDINGS))]
        if len(files) != 1:
            continue
        mask, grid = read_volume(files[0])
        if on is not None and grid != on:
            raise InputError(f"{files[0]}: lies on another grid than the other lobes, expected lobes of one scan")
        lobes, on = np.zeros(mask.shape, np.uint8) if lobes is None else lobes, grid
        lobes[mask > 0] = label
    if lobes is None or on is None:
        raise InputError(f"{folder}: has no lung_upper_lobe_left and the like, expected TotalSegmentator's files")
    return lobes, on
