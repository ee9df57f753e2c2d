"""The two DIR-Lab sets: voxels without a header, and landmarks in text files.

An axial stack is stored head first: axes right to left, front to back, head to feet. DIR-Lab counts voxels from 1 along
these axes; (1, 1, 1) is the centre of the right anterior superior voxel. The landmarks agree: towards the last slice
the lungs get wider, and breathing moves them more. So the direction is diag(1, 1, -1) in LPS. The origin is unknown and
set to 0. Values are HU + 1024. Sizes and spacings are as published by DIR-Lab. The spacings are rounded as there,
because published errors use them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from algorithm.errors import InputError
from algorithm.geometry import Grid, Matrix
from training.datasets.pair_files import PairFiles, ScanFiles

HEAD_FIRST: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
SLICE_MM = 2.5


@dataclass(frozen=True)
class DirlabSet:
    """One of the sets: its cases, and file names as regular expressions, in which N is the number of the case."""

    name: str
    cases: dict[int, tuple[int, int, float]]
    """Voxels along x and along y, slices, voxel spacing (mm) in a slice."""
    images: tuple[str, str]
    """Fixed, moving."""
    landmarks: tuple[str, str]

    def grid(self, case: int) -> Grid:
        """The grid of both scans of a case."""
        columns, slices, pixel_mm = self.cases[case]
        return Grid((columns, columns, slices), (pixel_mm, pixel_mm, SLICE_MM), direction=HEAD_FIRST)


FOUR_D_CT = DirlabSet(
    "dirlab4dct",
    {
        1: (256, 94, 0.97),
        2: (256, 112, 1.16),
        3: (256, 104, 1.15),
        4: (256, 99, 1.13),
        5: (256, 106, 1.10),
        6: (512, 128, 0.97),
        7: (512, 136, 0.97),
        8: (512, 128, 0.97),
        9: (512, 128, 0.97),
        10: (512, 120, 0.97),
    },
    images=(r"caseN_T00(_s|-ssm)?\.img", r"caseN_T50(_s|-ssm)?\.img"),
    landmarks=(r"caseN_(dirLab)?300_T00_xyz\.txt", r"caseN_(dirLab)?300_T50_xyz\.txt"),
)
"""Castillo et al. 2009; fixed: T00, inhale; moving: T50, exhale."""

COPDGENE = DirlabSet(
    "dirlab_copdgene",
    {
        1: (512, 121, 0.625),
        2: (512, 102, 0.645),
        3: (512, 126, 0.652),
        4: (512, 126, 0.590),
        5: (512, 131, 0.647),
        6: (512, 119, 0.633),
        7: (512, 112, 0.625),
        8: (512, 115, 0.586),
        9: (512, 116, 0.664),
        10: (512, 135, 0.742),
    },
    images=(r"copdN_iBHCT\.img", r"copdN_eBHCT\.img"),
    landmarks=(r"copdN_300_iBH_xyz_r1\.txt", r"copdN_300_eBH_xyz_r1\.txt"),
)
"""Castillo et al. 2013; fixed: inhale; moving: exhale."""


def dirlab_pairs(source: Path, dirlab: DirlabSet) -> list[PairFiles]:
    """The cases with any file below ``source``, at any depth; InputError if a case is not complete."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    pairs = []
    for case in dirlab.cases:
        names = [name.replace("N", str(case)) for name in (*dirlab.images, *dirlab.landmarks)]
        found = [[path for path in files if re.fullmatch(name, path.name, re.IGNORECASE)] for name in names]
        if any(found):
            fixed, moving, fixed_landmarks, moving_landmarks = (
                _only(source, name, paths) for name, paths in zip(names, found, strict=True)
            )
            grid = dirlab.grid(case)
            fixed_files = ScanFiles(fixed, grid, landmarks_vox=read_landmarks(fixed_landmarks))
            moving_files = ScanFiles(moving, grid, landmarks_vox=read_landmarks(moving_landmarks))
            pairs.append(PairFiles(f"{dirlab.name}_{case:02d}", fixed_files, moving_files))
    return pairs


def _only(source: Path, name: str, paths: list[Path]) -> Path:
    if len(paths) != 1:
        there = " and ".join(str(path.relative_to(source)) for path in paths) or "none"
        raise InputError(f"{source}: expected one file {name}, and there is {there}")
    return paths[0]


def read_landmarks(path: Path) -> Float[np.ndarray, "n 3"]:
    """Voxel indices from 0, read from lines of x, y, z from 1. "index" and the number of lines may come first."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        head, rows = (rows[:2], rows[2:]) if rows[:1] == [["index"]] else ([], rows)
        points = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: has a line that is no landmark, expected three numbers in each") from error
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise InputError(f"{path}: holds an array {points.shape} of numbers, expected three finite ones in each line")
    if head and head[1] != [str(len(points))]:
        raise InputError(f"{path}: holds {len(points)} landmarks, expected {' '.join(head[1])} as its head says")
    return points - 1
