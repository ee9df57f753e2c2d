"""A GPU that is not there: tensors that say they are on it, and complain as those would, but are worked out by the CPU.

It finds what a machine without a GPU hides: tensors of two devices in one operation, a GPU's tensor given to numpy,
and branches that ask for the device. It says nothing about arithmetic, memory or speed of a real one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
MARK = "_is_on_the_pretended_gpu"
ANSWERS = {"device": GPU, "is_cuda": True, "is_cpu": False}
CONTENTS_FOR_PYTHON = (Tensor.numpy, Tensor.__array__)
MAY_MIX = (Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type)
"""Take tensors of both devices."""
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
"""Take indices of either device where the tensor itself is on the GPU."""


class DeviceError(AssertionError):
    """What PyTorch would not do with a real GPU."""


def on_gpu(value: object) -> bool:
    """Whether it is a tensor that pretends."""
    return isinstance(value, Tensor) and getattr(value, MARK, False)


def marked(value: object, gpu: bool = True) -> object:
    """The tensor itself, which now says that it is there, or no longer; other things as they are."""
    if isinstance(value, Tensor):
        setattr(value, MARK, gpu)
    return value


class PretendedGpu(TorchFunctionMode):
    """While it is active, ``cuda`` is a device; each function of torch is checked before the CPU does its work."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        there = [leaf for leaf in tree_leaves((args, kwargs)) if on_gpu(leaf)]
        if there and isinstance(getattr(function, "__self__", None), type(Tensor.device)):  # a property is read
            answer = ANSWERS.get(function.__self__.__name__)
            if answer is not None and function.__name__ == "__get__":
                return answer
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return moved(function, *args, *kwargs.values())
        self._check(function, args, kwargs)
        if function == Tensor.data.__set__:  # as `Module.to` does with parameters
            marked(args[0], on_gpu(args[1]))
        gpu = bool(there) if function is not Tensor.copy_ else on_gpu(args[0])
        if kwargs.get("device") is not None:
            gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs = kwargs | {"device": torch.device("cpu")}
        result = function(*args, **kwargs)
        return tree_map(marked, result) if gpu else result

    def _check(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if function in INDEXING and on_gpu(args[0]):
            args = (args[0], *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if on_gpu(t)]
        if there and function in CONTENTS_FOR_PYTHON:
            raise DeviceError(f"{function.__name__} of a tensor on the GPU")
        if there and function not in MAY_MIX and any(not on_gpu(t) and t.dim() > 0 for t in tensors):
            raise DeviceError(f"{function} of tensors on the GPU and on the CPU")


def moved(function: Callable[..., Any], value: Tensor, *arguments: Any) -> Tensor:
    """`Tensor.to`, `cpu` or `cuda`: a copy; what is there already, in that type, remains itself."""
    gpu, dtype = on_gpu(value), value.dtype
    if function is not Tensor.to:
        gpu = function is Tensor.cuda
    for argument in arguments:
        if isinstance(argument, Tensor):
            gpu, dtype = on_gpu(argument), argument.dtype
        elif isinstance(argument, str | torch.device):
            gpu = torch.device(argument).type == "cuda"
        elif isinstance(argument, torch.dtype):
            dtype = argument
    if gpu == on_gpu(value) and dtype == value.dtype:
        return value
    copy = value.to(dtype, copy=True)
    marked(copy, gpu)
    return copy


MAKE_SUBCLASS = Tensor._make_subclass


def make_subclass(cls: type[Any], data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """Makes a `Parameter` of a tensor; for PyTorch that is no function like the others."""
    return marked(MAKE_SUBCLASS(cls, data, requires_grad, **kwargs), on_gpu(data))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """In the body, PyTorch finds a GPU."""
    with pytest.MonkeyPatch.context() as patch, PretendedGpu():
        patch.setattr(Tensor, "_make_subclass", staticmethod(make_subclass))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        yield
