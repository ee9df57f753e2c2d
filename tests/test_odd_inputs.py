"""What becomes of odd and bad inputs: each of tests/odd_inputs.py through the main program."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithm.files.images import read_field, read_image
from algorithm.geometry import displacement_at
from benchmarks.invariance import shown
from phantom.pair import PhantomPair
from tests.odd_inputs import TABLE, Desk, Made, OddInput, document
from tests.support.running import call_main, files_below, pair_options, results

PAGE = Path(__file__).parent.parent / "docs" / "robustness.md"
SAME_MM = 1.0
"""Largest distance from the plain pair's result, in the lungs; a voxel has 8 mm."""
RIGHT_MM = 3.0
"""Mean landmark error."""


def mapped_mm(output: Path, points_mm: np.ndarray) -> np.ndarray:
    """Fixed world positions (n, 3) through the written field."""
    displacement, grid = read_field(next((output / "images" / "displacement-field").glob("*.mha")))
    return points_mm + displacement_at(torch.from_numpy(points_mm), displacement.double(), grid).numpy()


@dataclass(frozen=True)
class Bench:
    """Runs the pair with what was made of it."""

    example: Path
    weights: Path

    def options(self, made: Made, masks: bool, output: Path) -> list[str]:
        """Where the input is a folder, the files are not named."""
        options = pair_options(self.example, output, self.weights)
        if any(option.startswith("--input=") for option in made.options):
            options = options[2:]
        if masks:
            options += [f"--{role}-mask={self.example / f'{role}_lobes.mha'}" for role in ("fixed", "moving")]
        return [*options, *made.options]


@pytest.fixture(scope="module")
def bench(example: Path, small_weights: Path) -> Bench:
    return Bench(example, small_weights)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> Callable[[bool], Path]:
    """The output for the plain pair, with masks or without."""

    @cache
    def output(masks: bool) -> Path:
        folder = tmp_path_factory.mktemp("plain")
        assert call_main(*bench.options(Made(()), masks, folder)) == 0
        return folder

    return output


def test_the_page_for_users_says_the_same() -> None:
    assert document() == PAGE.read_text()


def of(*outcomes: str) -> pytest.MarkDecorator:
    """The rows with these outcomes."""
    rows = {f"{group}: {odd.name!a}": odd for group, inputs in TABLE.items() for odd in inputs}
    assert len(rows) == sum(map(len, TABLE.values())) > 80  # each name once
    chosen = {name: odd for name, odd in rows.items() if odd.outcome in outcomes}
    return pytest.mark.parametrize("odd", chosen.values(), ids=chosen)


def check_warning(odd: OddInput, output: Path) -> None:
    assert odd.says in " ".join(results(output)["warnings"])


@of("refused")
def test_refused(tmp_path: Path, bench: Bench, capfd: pytest.CaptureFixture[str], odd: OddInput) -> None:
    (tmp_path / "in").mkdir()
    made = odd.make(Desk(tmp_path / "in", bench.example))
    before = files_below(tmp_path)
    assert call_main(*bench.options(made, odd.masks, tmp_path / "out")) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.endswith("\n")
    sentence = said.splitlines()[-1]
    assert odd.says in sentence and "expected" in sentence
    assert files_below(tmp_path) == before


@of("same result")
def test_same_result(
    tmp_path: Path, bench: Bench, example_pair: PhantomPair, plain: Callable[[bool], Path], odd: OddInput
) -> None:
    (tmp_path / "in").mkdir()
    made = odd.make(Desk(tmp_path / "in", bench.example))
    assert call_main(*bench.options(made, odd.masks, tmp_path / "out")) == 0
    points = example_pair.fixed_grid.to_world(example_pair.fixed_lobes[0, 0].nonzero().numpy()[:, ::-1])
    found, expected = (mapped_mm(output, points) for output in (tmp_path / "out", plain(odd.masks)))
    assert np.abs(found - expected).max() < SAME_MM < np.abs(points - expected).max()
    check_warning(odd, tmp_path / "out")
    assert odd.says or results(tmp_path / "out")["warnings"] == results(plain(odd.masks))["warnings"]


@of("right result", "identity")
def test_right_result(tmp_path: Path, bench: Bench, example_pair: PhantomPair, odd: OddInput) -> None:
    (tmp_path / "in").mkdir()
    made = odd.make(Desk(tmp_path / "in", bench.example))
    options = bench.options(made, odd.masks, tmp_path / "out")
    assert call_main(*options, "--refine=fast") == 0
    fixed, moving = example_pair.fixed_landmarks_mm, example_pair.moving_landmarks_mm
    if odd.outcome == "identity":
        moving = fixed
    elif made.swapped:
        fixed, moving = moving, fixed
    fixed, moving = made.fixed_world(fixed), made.moving_world(moving)
    named = dict(option[2:].split("=", 1) for option in options)
    both = shown(fixed, read_image(Path(named["fixed"])).grid) & shown(moving, read_image(Path(named["moving"])).grid)
    assert both.mean() > 0.2
    errors = np.linalg.norm(mapped_mm(tmp_path / "out", fixed) - moving, axis=1)[both]
    if odd.outcome == "identity":
        assert errors.mean() < SAME_MM
    else:
        assert errors.mean() < RIGHT_MM < np.linalg.norm(fixed - moving, axis=1)[both].mean()
    check_warning(odd, tmp_path / "out")


@of("warned")
def test_warned(tmp_path: Path, bench: Bench, odd: OddInput) -> None:
    (tmp_path / "in").mkdir()
    made = odd.make(Desk(tmp_path / "in", bench.example))
    assert call_main(*bench.options(made, odd.masks, tmp_path / "out"), "--refine=fast") == 0
    assert odd.says
    check_warning(odd, tmp_path / "out")
