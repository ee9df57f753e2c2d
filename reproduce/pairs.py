"""The pairs that the user gives, and what can be measured on each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from algorithm.errors import InputError
from evaluation.errors import CaseError
from evaluation.images import find_image
from evaluation.landmarks import find_landmarks, read_landmarks

from .published import Value, published

SAME_MM = 0.011
"""Published distances have two digits."""


@dataclass(frozen=True)
class Pair:
    """A folder with fixed.mha and moving.mha, and the ground truth of `evaluation.ground_truth` where there is any."""

    folder: Path

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.name

    @property
    def has_lobes(self) -> bool:
        """Of both scans."""
        return all(find_image(self.folder, f"{scan}_lobes") is not None for scan in ("fixed", "moving"))

    @cached_property
    def distances_mm(self) -> Float[np.ndarray, " n"] | None:
        """Between the landmarks before any registration; None without landmarks. InputError where they are broken."""
        files = [find_landmarks(self.folder, scan) for scan in ("fixed", "moving")]
        if not all(file.exists() for file in files):
            return None
        try:
            fixed, moving = (read_landmarks(file) for file in files)
        except CaseError as error:
            raise InputError(str(error)) from error
        if len(fixed) != len(moving):
            raise InputError(f"{self.folder}: {len(fixed)} fixed and {len(moving)} moving landmarks, expected as many")
        distances: np.ndarray = np.linalg.norm(fixed - moving, axis=1)
        return distances

    @cached_property
    def dirlab(self) -> int | None:
        """The number of the DIR-Lab 4DCT case, told by its landmarks, whatever the folder is called; None for others.

        The case has 300 landmarks whose distance before registration has the published mean and standard deviation.
        """
        if self.distances_mm is None or len(self.distances_mm) != published("table5")["landmarks"]:
            return None
        mean, spread = self.distances_mm.mean(), self.distances_mm.std()
        initial = [Value(*value) for value in published("table5")["initial"]]
        found = [
            number
            for number, value in enumerate(initial, start=1)
            if abs(value.mean - mean) < SAME_MM and abs((value.sd or 0.0) - spread) < SAME_MM
        ]
        return found[0] if found else None


def find_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Those in folders of pairs, or the folders of pairs themselves, in the order of their names.

    InputError for a path that leads to none, and where two pairs have one name: results are kept by it.
    """
    pairs = [pair for path in paths for pair in _pairs_in(path)]
    twice = [name for name, number in Counter(pair.name for pair in pairs).items() if number > 1]
    if twice:
        raise InputError(f"--pairs: two of the folders are called {twice[0]}, expected names of their own")
    return sorted(pairs, key=lambda pair: pair.name)


def _pairs_in(path: Path) -> list[Pair]:
    try:
        folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
    except OSError as error:
        raise InputError(f"{path}: cannot be listed ({error.strerror}), expected a folder of pairs") from error
    pairs = [Pair(folder.resolve()) for folder in folders if (folder / "fixed.mha").is_file()]
    if not pairs:
        raise InputError(
            f"{path}: holds no pair, expected fixed.mha and moving.mha in it, or in folders in it (python -m "
            "training.datasets makes them)"
        )
    for pair in pairs:
        if not (pair.folder / "moving.mha").is_file():
            raise InputError(f"{pair.folder}: has fixed.mha but no moving.mha, expected both")
    return pairs
