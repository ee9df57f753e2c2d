"""Choice of GPU or CPU, and the fallback when the GPU fails."""

import warnings as python_warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from .errors import InputError, first_line, gpu_unusable, out_of_memory
from .report import NO_GPU, Report

T = TypeVar("T")


def choose_device(option: str, report: Report) -> torch.device:
    """The device for ``--device``; auto without a working GPU is the CPU, with a warning.

    Single precision on the GPU is real single precision: TF32, PyTorch's default for convolutions, would round their
    factors to 10 bits. The U-Nets run in half precision anyway, and the refinement needs exact sums.
    """
    if option == "cpu":
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    trouble = gpu_trouble()
    if trouble is None:
        return torch.device("cuda")
    if option == "cuda":
        raise InputError(f"--device cuda: {trouble}, expected a GPU that this PyTorch can use (or --device cpu)")
    report.warn(f"{NO_GPU} ({trouble}).")
    return torch.device("cpu")


def gpu_trouble() -> str | None:
    """The reason why no GPU works, tested with a convolution; None if a GPU works."""
    with python_warnings.catch_warnings(record=True) as said:  # a driver that is too old causes only a warning
        python_warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                ones = torch.ones(1, 1, 3, 3, 3, device="cuda")
                total = float(torch.nn.functional.conv3d(ones, ones).cpu())
                return None if total == ones.numel() else f"it sums {ones.numel()} ones to {total}"
        except (RuntimeError, AssertionError, OSError) as error:  # AssertionError: PyTorch was built without CUDA
            return first_line(error)
    return first_line(said[0].message) if said else "there is none"


def on_device(
    stage: str, function: Callable[[torch.device], T], device: torch.device, report: Report, insist: bool = False
) -> T:
    """``function(device)``. If the GPU's memory does not suffice, it is repeated on the CPU, with a warning.

    The same happens if driver or libraries cannot use the GPU, unless the user ``insist``s on it.
    """
    try:
        return function(device)
    except RuntimeError as error:
        if device.type == "cpu" or not (out_of_memory(error) or (gpu_unusable(error) and not insist)):
            raise
        why = "for lack of memory on the GPU" if out_of_memory(error) else "since the GPU cannot be used"
        reason = first_line(error)
    # outside the except block, because the traceback kept the memory of the first attempt
    with suppress(RuntimeError):  # the failed GPU may raise again
        torch.cuda.empty_cache()
    report.warn(f"{stage} was repeated on the CPU, {why} ({reason}).")
    return function(torch.device("cpu"))
