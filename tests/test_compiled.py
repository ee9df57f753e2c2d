"""The compiled U-Nets give the numbers of torch's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from algorithm import registration
from algorithm.cascade.compiled import CompiledUNet, compiled, release
from algorithm.cascade.network import Cascade, CascadeSettings, UNet
from algorithm.geometry import Grid

pytest.importorskip("openvino")

SETTINGS = CascadeSettings((4, 8, 16), (2, 1), (32, 16, 24), (2, 1))


def trained(unet: UNet, seed: int) -> UNet:
    """Parameters as after a training: no norm is the identity, and the last layer says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(20, 16, 24), (4, 8, 12), (64, 64, 64)])
def test_the_numbers_are_those_of_torch(size: tuple[int, int, int]) -> None:
    unet = trained(UNet(SETTINGS.features), 1)
    images = 1 + 0.1 * torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(2))
    wanted = unet(images)
    found = CompiledUNet(unet, torch.float32)(images)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_bfloat16_differs_by_its_rounding() -> None:
    unet = trained(UNet(SETTINGS.features), 1)
    images = torch.rand(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = unet(images)
    found = CompiledUNet(unet, torch.bfloat16)(images)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_another_size_is_compiled_anew() -> None:
    unet = trained(UNet(SETTINGS.features), 1)
    network = CompiledUNet(unet, torch.float32)
    for size in ((16, 16, 16), (8, 16, 12), (16, 16, 16)):
        images = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(network(images), unet(images), atol=1e-4, rtol=1e-4)


def test_a_compiled_cascade_is_the_cascade() -> None:
    cascade = Cascade(SETTINGS)
    for seed, unet in enumerate(cascade.levels):
        assert isinstance(unet, UNet)
        trained(unet, seed)
        with torch.no_grad():
            unet.last.weight.mul_(0.3)
    generator = torch.Generator().manual_seed(1)
    grid = Grid(SETTINGS.network_size, (3.0, 3.0, 3.0))
    fixed, moving = (-1000 + 900 * torch.rand(1, 1, *grid.shape, generator=generator) for _ in range(2))
    with torch.no_grad():
        wanted, _ = cascade(fixed, grid, moving, grid)
        found, found_grid = compiled(cascade, torch.float32)(fixed, grid, moving, grid)
    assert found_grid == grid
    assert wanted.norm(dim=1).mean() > 1
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)


def test_what_was_compiled_ahead_is_used_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = Cascade(SETTINGS)
    monkeypatch.setattr(registration, "pays", lambda: True)
    monkeypatch.setattr(registration, "fastest_precision", lambda device: torch.float32)
    registration.get_ready(cascade, torch.device("cpu"))
    chosen = registration.fastest(cascade, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(CompiledUNet, "_compiled", lambda self, shape: pytest.fail(f"compiled again for {shape}"))
    grid = Grid(SETTINGS.network_size, (3.0, 3.0, 3.0))
    image = -1000 + 900 * torch.rand(1, 1, *grid.shape)
    first, _ = chosen(image, grid, image, grid)
    release(chosen)
    again, _ = registration.fastest(cascade, torch.device("cpu"), torch.float32)(image, grid, image, grid)
    assert torch.equal(first, again)


def test_it_serves_on_the_cpu_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = Cascade(SETTINGS)
    monkeypatch.setattr(registration, "pays", lambda: True)
    chosen = registration.fastest(cascade, torch.device("cpu"), torch.float32)
    assert all(isinstance(level, CompiledUNet) for level in chosen.levels)
    monkeypatch.setattr(registration, "pays", lambda: False)
    assert registration.fastest(cascade, torch.device("cpu"), torch.float32) is cascade


def test_a_signal_still_finds_its_handler() -> None:
    """OpenVINO's alternate signal stack is too small for it: the process would end by a segmentation fault."""
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    caught: list[bool] = []
    try:
        CompiledUNet(trained(UNet(SETTINGS.features), 1), torch.float32)(torch.rand(1, 2, 8, 8, 8))
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [True]


def test_nobody_is_told_of_a_run(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from algorithm.cascade.compiled import CompiledUNet, pays; "
        "from algorithm.cascade.network import UNet; "
        "pays(); CompiledUNet(UNet((4, 8)), torch.float32)(torch.rand(1, 2, 8, 8, 8)); "
        "print([name for name, module in sys.modules.items() if 'telemetry' in name.split('.')[0] and module])"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "[]\n"
    assert not list(tmp_path.iterdir())
