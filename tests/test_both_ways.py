"""A whole registration of a phantom with the bundled weights: its landmarks go to their places, both ways, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.results.result import Scan
from phantom.__main__ import write_pair
from phantom.pair import PhantomSettings, chest_grid, make_pair
from tests.support.running import lungreg

SIZE = (96, 96, 96)
MOST_MM = 0.4
"""Of the mean landmark error; 9 mm before."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_pair(folder, make_pair(PhantomSettings(fixed_grid=chest_grid(SIZE), moving_grid=chest_grid(SIZE))))
    scans = (folder / "fixed.mha", folder / "moving.mha", folder / "result")
    assert lungreg("--device=cpu", "--report=off", *scans) == 0
    return folder


def read(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 2))


def carried(study: Path, source: Path, of: Scan) -> np.ndarray:
    out = study / f"{source.stem}_from_{of}.csv"
    assert lungreg("points", study / "result", source, out, "--from", of) == 0
    return read(out)


@pytest.mark.parametrize("of", ["fixed", "moving"])
def test_landmarks_go_to_their_places_and_back(study: Path, of: Scan) -> None:
    other: Scan = "moving" if of == "fixed" else "fixed"
    here, there = (study / f"{scan}_landmarks.csv" for scan in (of, other))
    found = carried(study, here, of)
    errors = np.linalg.norm(found - read(there), axis=1)
    assert len(errors) > 50 and errors.mean() < MOST_MM, errors.mean()
    assert np.linalg.norm(read(here) - read(there), axis=1).mean() > 5
    back = carried(study, study / f"{here.stem}_from_{of}.csv", other)
    assert np.linalg.norm(back - read(here), axis=1).max() < 0.001


def test_the_files_for_other_programs_say_the_same(study: Path) -> None:
    """To what results.json says of them."""
    residual = json.loads((study / "result" / "results.json").read_text())["inverse_residual_mm"]
    there, back = (sitk.ReadTransform(str(study / "result" / name)) for name in ("transform.h5", "inverse.h5"))
    fixed, moving = (read(study / f"{scan}_landmarks.csv") for scan in ("fixed", "moving"))
    mapped = np.array([there.TransformPoint(point) for point in fixed.tolist()])
    returned = np.array([back.TransformPoint(point) for point in moving.tolist()])
    assert np.linalg.norm(mapped - moving, axis=1).mean() < MOST_MM
    assert np.linalg.norm(returned - fixed, axis=1).mean() < MOST_MM
    round_trip = np.array([there.TransformPoint(point) for point in returned.tolist()])
    apart = np.linalg.norm(round_trip - moving, axis=1)
    assert residual["p99"] < 0.05 and apart.mean() < residual["mean"] + 0.02 and np.median(apart) < 0.05
