"""The bundled weights on a phantom pair, as a user runs them: the numbers in golden/ stay what they are.

test.sh repeats this check in the container.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from algorithm.cascade.weights import BUNDLED, MANIFEST
from tests.support.golden_check import check

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> None:
    """``python -m ARGUMENTS``; what it printed is in the failure."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    run("phantom", folder, "--size", 48, 48, 48)
    return folder


@pytest.mark.parametrize("refine", ["off", "full"])
def test_bundled_weights_register_the_phantom_as_they_did(tmp_path: Path, example: Path, refine: str) -> None:
    if not (BUNDLED / MANIFEST).exists():
        pytest.fail(f"weights/{MANIFEST} is missing: the repository comes with trained weights, here are none")
    run("algorithm", f"--input={example}", f"--output={tmp_path}", "--device=cpu", f"--refine={refine}")
    check(tmp_path, example, refine)
