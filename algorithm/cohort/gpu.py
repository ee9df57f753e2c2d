"""Chooses a GPU for a worker if no scheduler did: one that no other worker of this user holds."""

import fcntl
import os
import tempfile
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")
VARIABLE = "CUDA_VISIBLE_DEVICES"

_held: list[int] = []
"""Descriptors of locks that are held until this process ends."""


def take_gpu() -> None:
    """Make one GPU the only visible one, before CUDA is loaded. Nothing changes with one GPU or none, or when all are
    taken."""
    devices = visible()
    if len(devices) < 2:
        return
    for device in devices:
        path = Path(tempfile.gettempdir()) / f"lungreg-{os.getuid()}-gpu-{device.replace('/', '_')}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _held.append(descriptor)
        os.environ[VARIABLE] = device
        return


def visible() -> list[str]:
    """The GPUs that CUDA would see, by their names or numbers."""
    if VARIABLE in os.environ:
        return [name.strip() for name in os.environ[VARIABLE].split(",") if name.strip()]
    return [str(number) for number in range(len(list(DRIVER.iterdir())))] if DRIVER.is_dir() else []
