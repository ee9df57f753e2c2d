"""Lung masks from the lobes that other programs wrote.

TotalSegmentator: one file with all labels, or a folder with one file per structure.
lungmask: lobes (1 to 5) or lungs (1, 2).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool

from imagefiles import ENDINGS

from ..errors import InputError
from ..files.images import read_volume
from ..files.writing import write_image
from ..geometry import Grid

TOTALSEGMENTATOR = {2: (10, 11, 12, 13, 14), 1: (13, 14, 15, 16, 17)}
"""Labels of the five lobes, by TotalSegmentator's version."""
MOST_LOBES = 6
"""Highest label of a file that has only lobes or lungs."""


def lungs_of(path: Path) -> tuple[Bool[np.ndarray, "z y x"], Grid]:
    """The mask of all lobes, and its grid; InputError when there are no lobes."""
    if path.is_dir():
        return _from_folder(path)
    labels, grid = read_volume(path)
    found = sorted(int(label) for label in np.unique(labels) if label > 0)
    mask = np.isin(labels, found if found and found[-1] <= MOST_LOBES else lobes_of_totalsegmentator(labels))
    if not mask.any():
        raise InputError(
            f"{path}: has the labels {', '.join(map(str, found[:20])) or 'none but 0'}, expected lobes: 1 to "
            f"{MOST_LOBES} alone, or TotalSegmentator's {TOTALSEGMENTATOR[2][0]} to {TOTALSEGMENTATOR[2][-1]}"
        )
    return mask, grid


def lobes_of_totalsegmentator(labels: np.ndarray) -> tuple[int, ...]:
    """The labels of the lobes in a file of TotalSegmentator.

    A file does not say which version wrote it. Some labels are lobes in only one version: in that version they are
    three lobes, in the other they are small organs (pancreas and adrenals; oesophagus, trachea and thyroid). So the
    version with more voxels in such labels is taken.
    """
    first, second = TOTALSEGMENTATOR[1], TOTALSEGMENTATOR[2]
    only = [np.isin(labels, sorted(set(one) - set(other))).sum() for one, other in ((first, second), (second, first))]
    return first if only[0] > only[1] else second


def _from_folder(folder: Path) -> tuple[Bool[np.ndarray, "z y x"], Grid]:
    files = sorted(path for path in folder.glob("lung_*lobe*") if path.name.endswith(tuple(ENDINGS)))
    if not files:
        raise InputError(f"{folder}: has no lung_*lobe* in it, expected TotalSegmentator's files for the lobes")
    mask, grid = read_volume(files[0])
    mask = mask > 0
    for path in files[1:]:
        other, other_grid = read_volume(path)
        if other_grid != grid:
            raise InputError(f"{path}: lies on another grid than {files[0].name}, expected lobes of one scan")
        mask |= other > 0
    return mask, grid


@contextmanager
def mask_file(lobes: Path | None, mask: Path | None) -> Iterator[Path | None]:
    """``mask``, or a temporary file with the lungs from ``lobes``, which exists only in the body."""
    if lobes is None:
        yield mask
        return
    lungs, grid = lungs_of(lobes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"lungs_of_{lobes.name.partition('.')[0]}.mha"
        write_image(path, torch.from_numpy(lungs.astype(np.uint8))[None, None], grid)
        yield path
