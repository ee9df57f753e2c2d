"""Loops over voxels, compiled by numba for the processor at hand.

Compiled code is stored for the next import: beside the file of the loop, in the user's cache, or in NUMBA_CACHE_DIR. If
none of these is writable, the code is compiled each time, which takes some seconds. So the image of the container has
compiled code, in the folder that LUNGREG_LOOPS names.
"""

import atexit
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

import numba
import torch

Function = TypeVar("Function", bound=Callable[..., object])
f4, i4 = numba.float32, numba.int32
PROCESSOR = "x86-64-v3"
"""The loops of the image are compiled for this level, AVX2 (NUMBA_CPU_NAME in the Dockerfile)."""


def use_stored_loops(folder: Path) -> None:
    """Load the loops in ``folder`` instead of compiling them, if the processor has AVX2.

    numba loads only from a folder that it can also write to, so this is a copy, which is removed at exit. Without a
    place for the copy, nothing changes.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return
    with suppress(OSError):
        copy = Path(tempfile.mkdtemp(prefix="lungreg-loops-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        for name, value in (("CACHE_DIR", str(copy)), ("CPU_NAME", PROCESSOR), ("CPU_FEATURES", "")):
            setattr(numba.config, name, value)


if "LUNGREG_LOOPS" in os.environ:
    use_stored_loops(Path(os.environ["LUNGREG_LOOPS"]))


def compiled_loop(signature: str | None = None) -> Callable[[Function], Function]:
    """Compile a function that runs without Python's lock. With a signature, it is compiled immediately."""

    def compiled(function: Function) -> Function:
        plain = inspect.unwrap(function)  # without the type checks that tests add
        if signature is None:  # compiled as part of its callers
            return cast(Function, numba.njit(nogil=True)(plain))
        try:
            return cast(Function, numba.njit(signature, nogil=True, cache=True)(plain))
        except Exception:  # any fault of the stored code: compile it again
            return cast(Function, numba.njit(signature, nogil=True)(plain))

    return compiled


@compiled_loop()
def cell(index, size):  # type: ignore[no-untyped-def]
    """First voxel of the cell of a continuous index, weight of the next voxel, whether it is beyond the centres."""
    clamped = min(max(index, 0.0), size - 1.0)
    first = min(int(clamped), size - 2)
    return first, f4(clamped - first), clamped != index
