"""Sets of files with a header: Learn2Reg LungCT, EMPIRE10, and any files named in a table."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from algorithm.errors import InputError
from training.datasets.pair_files import PairFiles, ScanFiles, present

COLUMNS = "subject,fixed,moving[,fixed_mask,moving_mask]"


def learn2reg_pairs(source: Path, keypoints: bool) -> list[PairFiles]:
    """The pairs of LungCT, as in the challenge (imagesTr) or as on Zenodo (scans); fixed: exhale, moving: inhale.

    With ``keypoints``, the automatic correspondences replace landmarks. They are voxel indices from 0, as in the
    challenge's evaluation.
    """
    names, pairs = _pairs(source, "imagesTr", "masksTr", ("_0000.nii.gz", "_0001.nii.gz"))
    points_files, columns = ("keypointsTr/{}_0000.csv", "keypointsTr/{}_0001.csv"), (slice(0, 3), slice(0, 3))
    if not pairs:
        names, pairs = _pairs(source, "scans", "lungMasks", ("_exp.nii.gz", "_insp.nii.gz"))
        points_files, columns = ("keypoints/{}.csv", "keypoints/{}.csv"), (slice(0, 3), slice(3, 6))
    if not keypoints:
        return pairs
    with_points = []
    for name, pair in zip(names, pairs, strict=True):
        fixed, moving = (
            replace(scan, landmarks_vox=_csv_points(source / file.format(name), take))
            for scan, file, take in zip((pair.fixed, pair.moving), points_files, columns, strict=True)
        )
        with_points.append(replace(pair, fixed=fixed, moving=moving))
    return with_points


def empire10_pairs(source: Path) -> list[PairFiles]:
    """The pairs of EMPIRE10. Its landmarks are not public."""
    names, pairs = _pairs(source, "scans", "lungMasks", ("_Fixed.mhd", "_Moving.mhd"))
    return [replace(pair, name=f"empire10_{name}") for name, pair in zip(names, pairs, strict=True)]


def _pairs(source: Path, images: str, masks: str, endings: tuple[str, str]) -> tuple[list[str], list[PairFiles]]:
    """Every NAME with a file NAME + fixed ending in SOURCE/images, and their pairs.

    The masks have the same names in SOURCE/masks. If this folder exists, all masks must be in it.
    """
    fixed, moving = endings
    names = [path.name.removesuffix(fixed) for path in sorted((source / images).glob(f"*{fixed}"))]
    masked = (source / masks).is_dir()

    def scan(file: str) -> ScanFiles:
        mask = present(source / masks / file) if masked else None
        return ScanFiles(present(source / images / file), mask=mask)

    return names, [PairFiles(name, scan(name + fixed), scan(name + moving)) for name in names]


def _csv_points(path: Path, columns: slice) -> Float[np.ndarray, "n 3"]:
    """Three columns of a .csv file without a header."""
    present(path)
    try:
        points: np.ndarray = pd.read_csv(path, header=None).to_numpy(dtype=np.float64)[:, columns]
    except ValueError as error:
        raise InputError(f"{path}: is no table of numbers, expected keypoints in voxels") from error
    if points.shape[1] != 3 or not np.isfinite(points).all():
        raise InputError(f"{path}: expected finite numbers in columns {columns.start + 1} to {columns.stop}")
    return points


def table_pairs(source: Path, table: Path) -> list[PairFiles]:
    """The pairs of a .csv table with the columns ``COLUMNS``; its paths are relative to ``source``."""
    present(table)
    try:
        rows = pd.read_csv(table, dtype=str, skipinitialspace=True).fillna("")
    except ValueError as error:
        raise InputError(f"{table}: is no table, expected one of {COLUMNS}") from error
    if not {"subject", "fixed", "moving"} <= set(rows.columns):
        raise InputError(f"{table}: has the columns {','.join(rows.columns)}, expected {COLUMNS}")
    pairs = {}
    for row in rows.to_dict("records"):
        subject = row["subject"]
        if not re.fullmatch(r"\w[\w-]*", subject) or subject in pairs:
            raise InputError(f"{table}: names the subject {subject!r}, expected letters, digits, _ and -, each once")
        pairs[subject] = PairFiles(subject, _table_scan(source, row, "fixed"), _table_scan(source, row, "moving"))
    return list(pairs.values())


def _table_scan(source: Path, row: dict[str, str], name: str) -> ScanFiles:
    mask = row.get(f"{name}_mask")
    return ScanFiles(present(source / row[name]), mask=present(source / mask) if mask else None)
