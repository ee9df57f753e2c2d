"""The way through a GPU, on a pretended one: the CPU's results, and nothing that a real one would refuse."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import algorithm.registration
from algorithm.cascade.network import CascadeSettings
from algorithm.cascade.weights import load_cascade
from algorithm.devices import choose_device
from algorithm.errors import InputError
from algorithm.report import Report
from baselines import ruehaak
from tests.support.pretended_gpu import DeviceError, on_gpu, pretended_gpu
from tests.support.running import call_main, coarsely, exit_code, field_array, pair_options, results
from training import data, train
from training.settings import TrainSettings

QUICK = TrainSettings(features=(4, 8), steps=(1, 1, 1), delta=(0.0, 0.1, 0.1), crop=(0, 0, 16), keypoints=200)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning"),  # autocast: it stays in float32
]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda there, here: there + here,
        lambda there, here: here.add_(there),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: here[there > 0],
        lambda there, here: there.numpy(),
        lambda there, here: np.asarray(there),
        lambda there, here: torch.nn.Linear(3, 1)(there),
        lambda there, here: torch.nn.Linear(3, 1).to("cuda")(here),
    ],
)
def test_the_pretended_gpu_refuses_what_a_real_one_would(
    mistake: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    with pretended_gpu(), pytest.raises(DeviceError):
        mistake(torch.ones(3, device="cuda"), torch.ones(3))


def test_the_pretended_gpu_does_what_a_real_one_would() -> None:
    with pretended_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == (there * 2).device.type == here.to(there).device.type == "cuda"
        assert there.is_cuda and there[here > 0].is_cuda and (there * torch.tensor(2.0)).is_cuda
        assert here.device == there.cpu().device == torch.device("cpu")
        assert torch.nn.Linear(3, 1).to("cuda")(there).is_cuda
        assert torch.equal(there.cpu(), here)
        assert here.copy_(there).device == torch.device("cpu")


NO_KERNEL = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")
OLD_DRIVER = RuntimeError("CUDA driver version is insufficient for CUDA runtime version")
NO_CUDA = AssertionError("Torch not compiled with CUDA enabled")


def raising(error: Exception) -> Callable[..., object]:
    def function(*_: object, **__: object) -> object:
        raise error

    return function


def old_driver() -> bool:
    """As PyTorch says it."""
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 9).", stacklevel=2)
    return False


@pytest.mark.parametrize(
    ("place", "stand_in", "says"),
    [
        ("torch.nn.functional.conv3d", raising(NO_KERNEL), "no kernel image is available for execution on the device"),
        ("torch.ones", raising(OLD_DRIVER), "CUDA driver version is insufficient"),
        ("torch.ones", raising(NO_CUDA), "not compiled with CUDA"),
        ("torch.ones", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), "out of memory"),
        ("torch.nn.functional.conv3d", lambda a, b: 0 * a.sum(), "sums 27 ones to 0.0"),
        ("torch.cuda.is_available", raising(OLD_DRIVER), "CUDA driver version is insufficient"),
        ("torch.cuda.is_available", old_driver, "driver on your system is too old"),
        ("torch.cuda.is_available", lambda: False, "there is none"),
    ],
)
def test_a_gpu_that_cannot_compute_is_none(
    monkeypatch: pytest.MonkeyPatch, place: str, stand_in: Callable[..., object], says: str
) -> None:
    with pretended_gpu():
        monkeypatch.setattr(place, stand_in)
        report = Report()
        assert choose_device("auto", report) == torch.device("cpu")
        (warning,) = report.to_dict()["warnings"]
        assert "running on the CPU" in warning and says in warning and "\n" not in warning
        with pytest.raises(InputError, match=r"^--device cuda: .* expected a GPU") as refused:
            choose_device("cuda", Report())
        assert says in str(refused.value) and "\n" not in str(refused.value)
        assert choose_device("cpu", Report()) == torch.device("cpu")
        monkeypatch.undo()


@pytest.mark.parametrize("step", ["predict", "refine"])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_fails_later(
    tmp_path: Path,
    example: Path,
    small_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: str,
    device: str,
) -> None:
    """It has code for the first convolution, but not for all. The user who asked for it is told, once."""
    whole = getattr(algorithm.registration, step)

    def fails_there(*arguments: Any) -> object:
        if any(on_gpu(a) or getattr(a, "type", "") == "cuda" for a in arguments):
            raise NO_KERNEL
        return whole(*arguments)

    monkeypatch.setattr(algorithm.registration, "fastest_precision", lambda _: torch.float32)
    monkeypatch.setattr(algorithm.registration, step, fails_there)
    options = pair_options(example, tmp_path / "out", small_weights)
    with pretended_gpu():
        code = call_main(*options, "--refine=fast", f"--device={device}")
    if device == "auto":
        assert code == 0
        assert any(
            "CPU, since the GPU cannot be used (CUDA error: no ker" in w for w in results(tmp_path / "out")["warnings"]
        )
    else:
        said = capfd.readouterr().err
        assert code == 1 and "the GPU cannot be used: CUDA error: no kernel" in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_single_precision_is_single_precision() -> None:
    with pretended_gpu():
        choose_device("auto", Report())
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("refinement", ["off", "full"])
def test_a_whole_run(
    tmp_path: Path, example: Path, small_weights: Path, refinement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("algorithm.registration.fastest_precision", lambda _: torch.float32)
    monkeypatch.setattr("algorithm.registration.pays", lambda: False)  # the CPU goes the GPU's way, to compare
    monkeypatch.setattr("algorithm.refinement.refine.applies", lambda *_: False)
    cpu, gpu = tmp_path / "cpu", tmp_path / "gpu"
    assert call_main(*pair_options(example, cpu, small_weights), f"--refine={refinement}") == 0
    with pretended_gpu():
        assert call_main(*pair_options(example, gpu, small_weights), f"--refine={refinement}", "--device=auto") == 0
    assert results(gpu)["device"] == "cuda"
    assert not any("CPU" in warning for warning in results(gpu)["warnings"])
    np.testing.assert_allclose(field_array(gpu), field_array(cpu), atol=1e-3)


def test_keypoints_and_the_conventional_method(tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = replace(ruehaak.CONVENTIONAL, spacing_mm=(16.0,), steps=(5,), weights=ruehaak.CONVENTIONAL.weights[:1])
    monkeypatch.setattr(ruehaak, "CONVENTIONAL", coarse)
    for device in ("cpu", "cuda"):
        files = (example / "fixed.mha", example / "moving.mha", tmp_path / device)
        with pretended_gpu(), coarsely("baselines.ruehaak"):
            assert exit_code(ruehaak.main, "ruehaak", *files, f"--device={device}") == 0
    np.testing.assert_allclose(field_array(tmp_path / "cuda"), field_array(tmp_path / "cpu"), atol=1e-3)


def test_training(tmp_path: Path, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CascadeSettings", partial(CascadeSettings, network_size=(32, 24, 32)))
    monkeypatch.setattr(train, "training_precision", lambda _: torch.float32)
    (tmp_path / "packed").mkdir()
    data.pack_scan(example / "moving.mha", tmp_path / "packed" / "moving.npz")
    weights = []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            train.train(QUICK, train.Run(tmp_path / device, train=tmp_path / "packed", device=device))
        weights.append(load_cascade(tmp_path / device / "weights").cascade.state_dict())
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, atol=1e-3, rtol=0)
