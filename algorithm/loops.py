"""Loops over voxels, compiled by numba for the processor at hand.

Compiled code is stored for the next import: beside the file of the loop, in the user's cache, or in NUMBA_CACHE_DIR. If
none of these is writable, the code is compiled each time, which takes some seconds.
"""

import inspect
from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])
f4, i4 = numba.float32, numba.int32


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
