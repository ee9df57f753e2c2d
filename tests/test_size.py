"""Full-size scans fit into the memory that is promised, and into that of a GPU or else not at all silently.

The promise itself, two scans of 512×512×974 and of 768×768×600 voxels registered with 16 GB, takes many minutes:

    FULL_SIZE=1 python -m pytest tests/test_size.py -k promise
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.devices import on_device
from algorithm.errors import InputError, exit_code
from algorithm.fields.transform import Transform
from algorithm.files.images import Image, canonical, read_image
from algorithm.files.writing import write_image_slabs
from algorithm.geometry import Affine, Grid, inside, moving_index, resample_image, warp
from algorithm.report import Report
from phantom.__main__ import write_pair
from phantom.pair import PhantomSettings, chest_grid, make_pair
from tests.support.running import results
from tests.support.strategies import examples, generators, grids, numbers, rotations

pytestmark = pytest.mark.usefixtures("one_thread")
GB = 10**9
FULL = Grid((512, 512, 974), (0.7, 0.7, 0.5), (-180.0, -170.0, -240.0))
LIMIT_BYTES = 16 * GB


# --- what is resampled -----------------------------------------------------------------------------------------------


def plainly(image: Tensor, source: Grid, target: Grid, affine: Affine, fill: float) -> Tensor:
    """The definition of `resample_image`: all of the image smoothed by convolutions, then sampled."""
    steps = np.abs(np.linalg.inv(source.axes) @ np.array(affine.matrix) @ target.axes).max(axis=1)
    smooth = image.double()
    for axis, step in zip((4, 3, 2), steps, strict=True):
        sigma = math.sqrt(max(step**2 - 1, 0) / 12)
        if sigma < 0.2:
            continue
        radius = math.ceil(3 * sigma)
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
        pad, shape = [0] * 6, [1] * 5
        pad[2 * (4 - axis)] = pad[2 * (4 - axis) + 1] = radius
        shape[axis] = len(taps)
        smooth = F.conv3d(F.pad(smooth, pad, mode="replicate"), (taps / taps.sum()).reshape(shape))
    values = warp(smooth, source, None, target, affine=affine)
    seen = inside(moving_index(target, source, None, affine, values), source.shape)[:, None]
    return torch.where(seen, values, fill).float()


def same_but_at_the_rim(found: Tensor, expected: Tensor, source: Grid, target: Grid, affine: Affine) -> None:
    """Half a voxel outside the source rounding decides whether there is an image."""
    index = moving_index(target, source, None, affine, torch.zeros(1, dtype=torch.float64))[0].numpy()
    undecided = (np.abs(index - np.floor(index) - 0.5) < 1e-3).any(axis=-1)
    np.testing.assert_allclose(found[0, 0].numpy()[~undecided], expected[0, 0].numpy()[~undecided], atol=0.05)


@st.composite
def pairs(draw: st.DrawFn, turned: bool) -> tuple[Grid, Grid, Affine]:
    """A source, a target of about the same place, coarser along some axes, finer along others; a map between them."""
    source = draw(grids(min_size=2, max_size=14, max_spacing=1.5))
    target = source.resized((draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 8))))
    shift = source.axes @ np.array([draw(numbers(-3, 3)) for _ in range(3)])
    if not turned:
        return source, target, Affine.from_arrays(np.eye(3), shift)
    middle = source.to_world((np.array(source.size) - 1) / 2)
    matrix = draw(rotations(0.5)) * [draw(numbers(0.7, 1.4)) for _ in range(3)]
    return source, target, Affine.from_arrays(matrix, middle - matrix @ middle + shift)


def noise(grid: Grid, generator: torch.Generator) -> Tensor:
    return torch.randint(-1000, 400, (1, 1, *grid.shape), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("turned", [False, True])
@examples(25)
@given(data=st.data(), generator=generators(), most=st.sampled_from([1, 300, 2**24]))
def test_in_parts_or_axis_by_axis_it_is_the_definition(
    turned: bool, data: st.DataObject, generator: torch.Generator, most: int
) -> None:
    source, target, affine = data.draw(pairs(turned))
    image = noise(source, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("algorithm.geometry.resampling._PART_VOXELS", most)
        found = resample_image(image, source, target, affine=affine, least=-1000.0, fill=-2000.0)
    same_but_at_the_rim(found, plainly(image, source, target, affine, -2000.0), source, target, affine)


def test_axes_that_run_against_each_other_are_parallel_too() -> None:
    """The target turned by 180° about z: its x and y run backwards."""
    source = Grid((12, 10, 9), (0.7, 0.8, 1.0), (4.0, 5.0, 6.0))
    ahead = source.resized((5, 4, 7))
    corner = ahead.to_world(np.array([4, 3, 0]))
    x, y, z = (float(v) for v in corner)
    target = replace(ahead, origin=(x, y, z), direction=((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0)))
    image = noise(source, torch.Generator().manual_seed(0))
    plain, turned = (resample_image(image, source, grid, least=-1000.0, fill=0.0) for grid in (ahead, target))
    torch.testing.assert_close(turned, plain.flip(3, 4), atol=1e-3, rtol=0)


# --- memory, at full size --------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], object]) -> int:
    """How much more memory than before the process had at most, while ``function`` ran; Linux keeps count."""

    def status(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def huge(grid: Grid) -> Tensor:
    """An int16 scan of any size that takes no memory: one voxel, seen from everywhere."""
    return torch.full((1, 1, 1, 1, 1), -700, dtype=torch.int16).expand(1, 1, *grid.shape)


def test_the_measure_sees_a_copy_of_the_scan() -> None:
    part = Grid((512, 512, 200))
    assert peak_bytes(lambda: huge(part).float().add_(1)) > 3.9 * math.prod(part.size)


@pytest.mark.parametrize("turned", [False, True])
def test_no_scan_of_full_size_is_held_as_float(turned: bool) -> None:
    """The middle alone is 0.26 GB as float32, and to smooth it at once took several copies."""
    affine = Affine.from_arrays(np.array([[1.0, 0.02, 0.0], [-0.02, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.zeros(3))
    target = FULL.cropped((128, 128, 0), (256, 256, 974)).resized((64, 64, 160))
    values: list[Tensor] = []

    def resample() -> None:
        map_ = affine if turned else Affine()
        values.append(resample_image(huge(FULL), FULL, target, affine=map_, least=-1000.0, fill=-1000.0))

    assert min(peak_bytes(resample) for _ in range(2)) < 0.25 * GB  # libraries may be loaded in the first
    assert values[0].shape == (1, 1, *target.shape)
    assert (values[0][..., 20:-20, :, :] + 700).abs().max() < 0.01


def test_neither_field_nor_warped_image_is_held() -> None:
    """3.06 GB and 0.5 GB; the first slabs stand for the others."""
    small = FULL.resized((96, 80, 96))
    transform = Transform(torch.zeros(1, 3, *small.shape), small)
    moving = Image(huge(FULL), FULL, Path("none"))
    counts: list[int] = []

    def slabs() -> None:
        counts.append(sum(slab.numel() for slab in islice(transform.field_slabs(FULL), 2)))
        counts.append(sum(slab.numel() for slab in islice(transform.warped_slabs(moving, FULL), 2)))

    assert peak_bytes(slabs) < 0.3 * GB
    assert counts == [3 * 2 * 8 * 512 * 512, 2 * 8 * 512 * 512]


# --- a whole process with a limit ------------------------------------------------------------------------------------


def write_big_pair(folder: Path, size: tuple[int, int, int]) -> list[str]:
    """A phantom pair interpolated to so many voxels, with its lungs; options for it."""
    write_pair(folder, make_pair(PhantomSettings(fixed_grid=chest_grid((56, 44, 52)))))
    still = Transform(torch.zeros(1, 3, 2, 2, 2), chest_grid((2, 2, 2)))
    options = []
    for name in ("fixed", "moving"):
        small = canonical(read_image(folder / f"{name}.mha"))
        grid = small.grid.resized(size)
        path = folder / f"big_{name}.mha"
        write_image_slabs(path, grid, still.warped_slabs(small, grid), torch.int16)
        options += [f"--{name}={path}", f"--{name}-mask={folder / name}_lobes.mha"]
    return options


ALGORITHM = ("-m", "algorithm")
COARSELY = ("-c", "import sys; from tests.support.running import call_main; sys.exit(call_main(*sys.argv[1:]))")


def run_limited(limit_bytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in a process that may have so much private memory (RLIMIT_DATA), on one thread."""
    limited = f'ulimit -d {limit_bytes // 1024}; exec "$@"'
    return subprocess.run(
        ["sh", "-c", limited, "sh", sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # each thread has a stack and an arena of its own
    )


SMALLER = (256, 256, 320)
SMALLER_LIMIT = 1_100_000_000
"""0.85 to 0.95 GB are taken, not the same each time: the U-Nets are compiled while the scans are prepared. Half is
taken by the programs and what they keep, the rest by slabs. The whole field (0.25 GB, and as much for every step of
its making) does not fit besides."""


def test_a_smaller_pair_with_a_smaller_limit(tmp_path: Path, small_weights: Path) -> None:
    options = write_big_pair(tmp_path, SMALLER)
    options += [f"--weights={small_weights}", "--refine=off", f"--output={tmp_path / 'out'}", "--device=cpu"]
    done = run_limited(SMALLER_LIMIT, *COARSELY, *options)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out")["jacobian"]["voxels"] == math.prod(SMALLER)


def test_the_limit_is_felt_and_said_in_one_sentence() -> None:
    job = "exit_code(lambda: [torch.ones(2**25) for _ in range(100)])"
    done = run_limited(SMALLER_LIMIT, "-c", f"import torch; from algorithm.errors import exit_code; exit({job})")
    assert done.returncode == 1
    assert done.stderr.startswith("out of memory: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="takes many minutes; FULL_SIZE=1 runs it")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("size", [(512, 512, 974), (768, 768, 600)])
def test_the_promise_of_16_gb(tmp_path: Path, size: tuple[int, int, int]) -> None:
    options = [*write_big_pair(tmp_path, size), "--device=cpu", "--refine=full", f"--output={tmp_path / 'out'}"]
    done = run_limited(LIMIT_BYTES, *ALGORITHM, *options)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out")["peak_memory_mb"] * 1e6 < LIMIT_BYTES
    assert results(tmp_path / "out")["jacobian"]["voxels"] == math.prod(size)


# --- no memory left --------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


def failing_on_the_gpu(error: BaseException) -> Callable[[torch.device], str]:
    def function(device: torch.device) -> str:
        if device.type == "cuda":
            raise error
        return f"done on the {device.type}"

    return function


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_gpu_without_memory_hands_over_to_the_cpu_and_says_so(error: BaseException) -> None:
    report = Report()
    assert on_device("The cascade", failing_on_the_gpu(error), CUDA, report) == "done on the cpu"
    (warning,) = report.to_dict()["warnings"]
    assert "The cascade" in warning and "CPU" in warning and str(error)[:15] in warning and "\n" not in warning


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), InputError("no"), MemoryError()])
def test_other_errors_on_the_gpu_stay(error: BaseException) -> None:
    report = Report()
    with pytest.raises(type(error)) as raised:
        on_device("The cascade", failing_on_the_gpu(error), CUDA, report)
    assert raised.value is error and report.to_dict()["warnings"] == []


def test_without_a_gpu_there_is_no_second_attempt() -> None:
    calls = []

    def function(device: torch.device) -> None:
        calls.append(device)
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        on_device("The cascade", function, torch.device("cpu"), Report())
    assert calls == [torch.device("cpu")]


def test_what_the_first_attempt_held_is_gone_before_the_second() -> None:
    held: list[int] = []

    class Large:
        def __init__(self) -> None:
            held.append(1)

        def __del__(self) -> None:
            held.pop()

    def function(device: torch.device) -> int:
        if device.type == "cuda":
            large = Large()
            raise torch.OutOfMemoryError(f"out of memory {len(held)} {large}")
        return len(held)

    assert on_device("The cascade", function, CUDA, Report()) == 0


def asks_for_too_much(kind: str) -> None:
    if kind == "torch":
        torch.empty(2**55)
    elif kind == "numpy":
        np.empty(2**55)
    else:
        raise MemoryError


@pytest.mark.parametrize("kind", ["torch", "numpy", "bare"])
def test_no_memory_is_exit_code_1_and_one_sentence(capfd: pytest.CaptureFixture[str], kind: str) -> None:
    assert exit_code(lambda: asks_for_too_much(kind)) == 1
    message = capfd.readouterr().err
    assert message.startswith("out of memory: ") and message.count("\n") == 1
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    assert f"the machine has {total:.1f} GB" in message
    assert kind == "bare" or re.search(r"\d{17} bytes|PiB", message)


def test_other_runtime_errors_are_faults() -> None:
    def job() -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        exit_code(job)
