"""Time of one pass through the cascade for each engine and number format, beside the minimum time for its arithmetic.

python -m benchmarks.forward [--device cuda] [--repeats 3]

The volumes are random, with 192×160×192 voxels; the time is the median over the repeats after one warm-up. The minimum
time is the number of floating-point operations of the cascade divided by the rate of one large matrix product in the
same number format. On the CPU the engines are torch, with the weights in two layouts, and OpenVINO
(`algorithm.cascade.compiled`).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from algorithm.cascade.compiled import compiled
from algorithm.cascade.network import Cascade
from algorithm.geometry import Grid

GFLOP = 728.0
"""Operations of three U-Nets at 192×160×192, 96×80×96 and 48×40×48 voxels; a multiplication and an addition count as
two."""


def seconds(body: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of ``body``."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        body()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_gflops(dtype: torch.dtype, device: torch.device, repeats: int, size: int = 4096) -> float:
    """Rate of a large matrix product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    return 2 * size**3 / seconds(lambda: a @ b, repeats, device) / 1e9


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    grid = Grid((192, 160, 192), (1.5, 1.5, 1.5))
    fixed, moving = (torch.randn(1, 1, *grid.shape, device=device) * 300 - 700 for _ in range(2))
    print(f"{device}, {torch.get_num_threads()} threads, {GFLOP:.0f} GFLOP")
    print("| arithmetic | engine | whole cascade s | one full-size U-Net s | floor s |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16 if device.type == "cpu" else torch.float16):
        floor = GFLOP / peak_gflops(dtype, device, arguments.repeats)
        for name, cascade in engines(device, dtype):
            whole = seconds(lambda: cascade(fixed, grid, moving, grid), arguments.repeats, device)  # noqa: B023
            network = seconds(lambda: one_network(cascade, fixed), arguments.repeats, device)  # noqa: B023
            print(f"| {dtype} | {name} | {whole:.2f} | {network:.2f} | {floor:.2f} |", flush=True)


def engines(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Cascade]]:
    """Cascades with random weights, by the name of their engine."""
    for name, layout in (("torch", torch.contiguous_format), ("torch, channels-last", torch.channels_last_3d)):
        cascade = Cascade().to(device).eval()
        for parameter in cascade.parameters():
            if parameter.ndim == 5:  # a convolution uses the memory layout of its weights
                parameter.data = parameter.data.contiguous(memory_format=layout)
        cascade.precision = dtype
        yield name, cascade
    if device.type == "cpu":
        yield "OpenVINO", compiled(Cascade().eval(), dtype)


def one_network(cascade: Cascade, fixed: torch.Tensor) -> torch.Tensor:
    """Run only the finest U-Net, without warping."""
    with torch.autocast(fixed.device.type, cascade.precision, enabled=cascade.precision != torch.float32):
        displacement: torch.Tensor = cascade.levels[-1](torch.cat([fixed, fixed], dim=1))
    return displacement


if __name__ == "__main__":
    main()
