"""Loops over voxels, compiled by numba for the processor at hand.

Compiled code is kept beside the file that has the loop, or in the user's cache, or where NUMBA_CACHE_DIR says, for the
next import. Where none of these can be written, it is compiled each time, which takes some seconds.
"""

import inspect
from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])
f4, i4 = numba.float32, numba.int32


def compiled_loop(signature: str | None = None) -> Callable[[Function], Function]:
    """Compiles a function, at once where the signature is given; it runs without Python's lock."""

    def compiled(function: Function) -> Function:
        plain = inspect.unwrap(function)  # without the checks of types that tests put around
        if signature is None:  # becomes part of those that call it
            return cast(Function, numba.njit(nogil=True)(plain))
        try:
            return cast(Function, numba.njit(signature, nogil=True, cache=True)(plain))
        except Exception:  # whatever is wrong with the files that keep compiled code, it can be compiled anew
            return cast(Function, numba.njit(signature, nogil=True)(plain))

    return compiled


@compiled_loop()
def cell(index, size):  # type: ignore[no-untyped-def]
    """Of a continuous index: first voxel of its cell, share of the next one, whether it is beyond the voxel centres."""
    clamped = min(max(index, 0.0), size - 1.0)
    first = min(int(clamped), size - 2)
    return first, f4(clamped - first), clamped != index
