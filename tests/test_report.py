"""results.json: version, weights, device, timings, quality figures, memory, warnings."""

import hashlib
import io
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithm import __version__
from algorithm.cascade.weights import FILE
from algorithm.devices import choose_device
from algorithm.errors import Progress
from algorithm.report import Report, of_the_result
from algorithm.results.texts import write_results
from tests.support.pretended_gpu import pretended_gpu
from tests.support.running import call_main, pair_options, results


def test_timings_add_up() -> None:
    report = Report()
    for name in ("a", "b", "a"):
        with report.timed(name):
            time.sleep(0.02)
    timings = report.to_dict()["timings_s"]
    assert list(timings) == ["a", "b", "total"]
    assert timings["b"] >= 0.02
    assert timings["a"] >= 0.04
    assert timings["total"] >= timings["a"] + timings["b"] - 0.002  # each is rounded


def test_warnings_are_kept_in_order_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    with caplog.at_level(logging.WARNING):
        report.warn("First.")
        report.warn("Second.")
    assert report.to_dict()["warnings"] == caplog.messages == ["First.", "Second."]


def test_later_values_replace_earlier_ones() -> None:
    report = Report()
    report.set(device="cpu", fixed="a")
    report.set(device="cuda")
    assert report.to_dict().items() >= {"version": __version__, "device": "cuda", "fixed": "a"}.items()


def test_memory_is_that_of_this_process() -> None:
    """Torch alone takes more than 100 MB; no test machine has a terabyte in use."""
    assert 100 < Report().to_dict()["peak_memory_mb"] < 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux keeps count")
def test_the_peak_is_not_that_of_the_program_which_started_the_process() -> None:
    held = np.ones(2**27)  # 1 GB
    job = "from algorithm.errors import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, check=True)
    assert 1e7 < int(done.stdout) < 5e8 < held.nbytes


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    report = Report()
    report.set(quality={"lung_dice_after": float("nan"), "jacobian_max": math.inf, "jacobian_min": 0.5})
    write_results(tmp_path / "results.json", report.to_dict())
    assert results(tmp_path)["quality"] == {"lung_dice_after": None, "jacobian_max": None, "jacobian_min": 0.5}


@pytest.mark.parametrize(
    ("option", "gpu", "device", "warns"),
    [("auto", True, "cuda", False), ("auto", False, "cpu", True), ("cpu", True, "cpu", False)],
)
def test_device(monkeypatch: pytest.MonkeyPatch, option: str, gpu: bool, device: str, warns: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    report = Report()
    with pretended_gpu() if gpu else nullcontext():
        assert choose_device(option, report) == torch.device(device)
    assert ("No GPU" in " ".join(report.to_dict()["warnings"])) == warns
    assert of_the_result([*report.to_dict()["warnings"], "The field folds."]) == ["The field folds."]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> dict[str, Any]:
    """results.json of a run that looks for a GPU in vain."""
    output = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert call_main(*pair_options(example, output, small_weights), "--device=auto", "--refine=full") == 0
    return results(output)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_written_results_say_what_was_run(written: dict[str, Any], small_weights: Path) -> None:
    assert written["version"] == __version__
    assert (written["fixed"], written["moving"], written["device"]) == ("fixed.mha", "moving.mha", "cpu")
    assert written["weights_sha256"] == hashlib.sha256((small_weights / FILE).read_bytes()).hexdigest()
    assert any("No GPU" in warning for warning in written["warnings"])


def test_written_numbers_are_finite_and_in_their_range(written: dict[str, Any]) -> None:
    assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in leaves(written))
    timings, quality, jacobian = written["timings_s"], written["quality"], written["jacobian"]
    steps = {"read", "lungs", "prepare", "cascade", "refine", "unfold", "quality", "write field", "write warped"}
    assert timings.keys() == steps | {"total"}
    assert all(seconds >= 0 for seconds in timings.values())
    assert sum(timings[step] for step in steps) <= timings["total"] + 0.01
    assert jacobian["folded_voxels"] == 0 and jacobian["non_finite_voxels"] == 0
    assert 0 < jacobian["jacobian_min"] < jacobian["jacobian_max"] < 4
    assert 0 < jacobian["std_log_jacobian"] < 1
    assert 0 < jacobian["lung_voxels"] < jacobian["voxels"]
    before, after = quality["before"], quality["after"]
    assert before["curvature"] == 0 and before["volume_change"] == 0
    assert after["local_correlation_distance"] < before["local_correlation_distance"]
    # the pre-alignment already lays the lungs onto each other; these networks are not trained, and add nothing to that
    assert 0.95 < before["lung_dice"] < 1 and 0.95 < after["lung_dice"] < 1
    assert 0 < after["mask_distance"] < 1.1 * before["mask_distance"] < 0.1
    assert 0 < after["inconsistency_mm"] < after["inconsistency_p95_mm"]


# --- for people ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_are_numbered_and_timed(terminal: bool) -> None:
    """Each a line when it begins and one when it ends; on a terminal the second takes the place of the first."""
    stream, log = Terminal(terminal), logging.getLogger("algorithm.report")
    handler, report = Progress(stream), Report(["read", "lungs"])
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with report.timed("read"):
            pass
        with report.timed("lungs"):
            report.warn("Odd.")
        with report.timed("another"):
            handler.end_line()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    read, lungs = "[1/2] Reading the scans", "[2/2] Finding the lungs"
    clear, wait = ("\r\x1b[2K", "") if terminal else ("", "\n")
    assert stream.getvalue() == (
        f"{read} ...{wait}{clear}{read}: 0.0 s\n{lungs} ...\nOdd.\n{lungs}: 0.0 s\nanother ...\nanother: 0.0 s\n"
    )
