"""The U-Nets on the CPU with OpenVINO: the same results as `algorithm.cascade.network.UNet`, in at most half the time.

The graph is built from the network's parameters, operation by operation. It is compiled for the size of the first
images. Nothing is traced, stored or downloaded. Measured: `python -m benchmarks.forward`.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .network import Cascade, UNet

# Before OpenVINO is imported: without this package, OpenVINO cannot send usage data over the network.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

LAST_SLAB = 16
"""Number of slices of features that are converted to single precision at a time."""
AXES = (2, 3, 4)
"""z, y, x of (n, c, z, y, x)."""


_kept: WeakKeyDictionary[Cascade, dict[torch.dtype, Cascade]] = WeakKeyDictionary()
"""The compiled cascades, kept as long as their original cascade exists."""


def compiled(cascade: Cascade, precision: torch.dtype) -> Cascade:
    """The cascade with its U-Nets compiled for the CPU; ``precision`` is float32 or bfloat16.

    Every call returns the same object, so the parameters must not change in between.
    """
    kept = _kept.setdefault(cascade, {})
    if precision not in kept:
        unets = [CompiledUNet(unet, precision) for unet in cascade.levels if isinstance(unet, UNet)]
        kept[precision] = Cascade(cascade.settings, unets)
    return kept[precision]


def compile_ahead(cascade: Cascade, precision: torch.dtype) -> None:
    """Compile for images of the network's size, for instance in a thread while other work leaves the processor idle."""
    size = cascade.settings.network_size[::-1]
    for unet, factor in zip(compiled(cascade, precision).levels, cascade.settings.factors, strict=True):
        if isinstance(unet, CompiledUNet):
            unet.compile_for((1, 2, *(n // factor for n in size)))


def release(cascade: Cascade) -> None:
    """Free the memory of a compiled cascade, a large part of what a run needs. The cascade can be used again."""
    for unet in cascade.levels:
        if isinstance(unet, CompiledUNet):
            unet.release()


def pays() -> bool:
    """Whether OpenVINO is installed and the processor has AVX2. It was faster on the tested processor with AVX-512.

    The kind of processor decides, not a speed test, so that the same machine always gives the same numbers.
    """
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class CompiledUNet(nn.Module):
    """`UNet`, for inference on the CPU."""

    def __init__(self, unet: UNet, precision: torch.dtype) -> None:
        super().__init__()
        self.unet, self.precision = unet, precision
        self._model: Any = None
        self._shape: tuple[int, ...] = ()

    def forward(self, images: Float[Tensor, "n 2 z y x"]) -> Float[Tensor, "n 3 z y x"]:
        """The same as `UNet.forward`; compiled again when the shape of the images changes."""
        self.compile_for(tuple(images.shape))
        found = self._model([images.float().contiguous().numpy()], share_inputs=True, share_outputs=True)[0]
        if self.precision != torch.bfloat16:
            return torch.from_numpy(found.copy())
        features = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        with torch.autocast("cpu", enabled=False):  # in slabs: features in single precision need much memory
            return torch.cat([self.unet.last(slab.float()) for slab in features.split(LAST_SLAB, dim=2)], dim=2)

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """Compile for images of this shape, unless it is the last compiled shape."""
        if self._shape != shape:
            self._model, self._shape = self._compiled(shape), shape

    def release(self) -> None:
        """Free the memory of the last inference."""
        if self._model is not None:
            self._model.release_memory()

    def _compiled(self, shape: tuple[int, ...]) -> Any:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # two runs would pin their threads to the same cores
        }
        with signal_stack_kept():
            return openvino.Core().compile_model(_graph(self.unet, shape, self.precision), "CPU", options)


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restore the thread's alternate signal stack after the body.

    OpenVINO (2026.4) leaves a stack that is too small for Python's handlers: a SIGTERM would cause a segmentation
    fault.
    """
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


def _graph(unet: UNet, shape: tuple[int, ...], precision: torch.dtype) -> Any:
    """The U-Net for images of ``shape``: (n, 2, z, y, x) → displacement (n, 3, z, y, x).

    With bfloat16 it ends before the last layer, whose result must not be rounded: → features (n, c, z, y, x) in
    bfloat16.
    """
    import openvino
    from openvino import opset13 as ops

    images = ops.parameter(list(shape), np.float32)
    values, skips = images, []
    for level, block in enumerate(unet.encoder):
        values = _block(_halved(values) if level else values, block)
        skips.append(values)
    skips.pop()
    for up, block in zip(unet.up, unet.decoder, strict=True):
        raised = ops.convolution_backprop_data(values, _constant(up.weight), strides=[2] * 3)
        raised = ops.add(raised, _for_channels(up.bias))
        values = _block(ops.concat([skips.pop(), raised], axis=1), block)
    if precision == torch.bfloat16:
        return openvino.Model([ops.convert(values, "bf16")], [images])
    last = ops.convolution(values, _constant(unet.last.weight), [1] * 3, [0] * 3, [0] * 3, [1] * 3)
    return openvino.Model([ops.add(last, _for_channels(unet.last.bias))], [images])


def _block(values: Any, block: nn.Module) -> Any:
    """Apply the block's convolutions, instance norms and rectifiers in order; TypeError for another kind of layer."""
    from openvino import opset13 as ops

    for layer in block.children():
        if isinstance(layer, nn.Conv3d):
            values = ops.convolution(values, _constant(layer.weight), [1] * 3, [1] * 3, [1] * 3, [1] * 3)
        elif isinstance(layer, nn.InstanceNorm3d):
            normal = _normalised(values, layer.eps)
            values = ops.add(ops.multiply(normal, _for_channels(layer.weight)), _for_channels(layer.bias))
        elif isinstance(layer, nn.ReLU):
            values = ops.relu(values)
        else:
            raise TypeError(f"{type(layer).__name__}: expected convolution, instance norm or rectifier")
    return values


def _normalised(values: Any, epsilon: float) -> Any:
    """Normalise each channel to mean 0 and variance 1."""
    from openvino import opset13 as ops

    centred = ops.subtract(values, _mean(values))
    variance = _mean(ops.multiply(centred, centred))
    return ops.divide(centred, ops.sqrt(ops.add(variance, ops.constant(np.float32(epsilon)))))


def _mean(values: Any) -> Any:
    """Mean of each channel, (n, c, 1, 1, 1), by repeated halving while the sizes are even.

    A single sum of millions of values (as in OpenVINO's own MVN) loses three digits in single precision.
    """
    from openvino import opset13 as ops

    sizes = [int(size) for size in values.get_output_shape(0)][2:]
    while all(size % 2 == 0 for size in sizes):
        values, sizes = _halved(values), [size // 2 for size in sizes]
    return ops.reduce_mean(values, ops.constant(np.array(AXES)), True)


def _halved(values: Any) -> Any:
    from openvino import opset13 as ops

    return ops.avg_pool(values, [2] * 3, [0] * 3, [0] * 3, [2] * 3, exclude_pad=False)


def _constant(parameter: Any) -> Any:
    from openvino import opset13 as ops

    return ops.constant(parameter.detach().float().cpu().numpy())


def _for_channels(parameter: Any) -> Any:
    return _constant(parameter.reshape(1, -1, 1, 1, 1))
