"""Number of threads, and how they wait. Both must be set before torch is loaded, because OpenMP reads them then.

This module imports nothing but the standard library.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def share_processors() -> None:
    """Set the environment variables of OpenMP (torch) and ITK that the user has not set.

    Threads that wait for each other sleep. By default they spin for milliseconds. If anything else runs on the
    processors, spinning threads then take the processor from the thread that they wait for.

    There are no more threads than processors in the container's quota. Both libraries themselves count the processors
    on which the process may run (taskset, cpuset).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    quota = cpu_quota()
    if quota < (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
        threads = str(max(1, math.ceil(quota)))
        os.environ.setdefault("OMP_NUM_THREADS", threads)
        os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", threads)


def take_threads(number: int) -> None:
    """Set the number of threads for all libraries, whatever was set before. Libraries already loaded ignore it."""
    for name in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(number)


def cpu_quota() -> float:
    """Number of processors that the control groups of this process allow; inf without a limit or without Linux."""
    quotas = [math.inf]
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                quotas += [_quota_v2(folder) for folder in _up_from(CGROUPS, path)]
            elif "cpu" in controllers.split(","):
                quotas += [_quota_v1(folder) for folder in _up_from(CGROUPS / "cpu", path)]
    return min(quotas)


def _up_from(root: Path, path: str) -> list[Path]:
    """The group's folder and all folders above it: each may have a limit. A container often has only the root."""
    group = root / path.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder == root or root in folder.parents]


def _quota_v2(folder: Path) -> float:
    """The quota of cpu.max, which has the time (or "max") and the period."""
    with suppress(OSError, ValueError):
        time, period = (folder / "cpu.max").read_text().split()
        return math.inf if time == "max" else int(time) / int(period)
    return math.inf


def _quota_v1(folder: Path) -> float:
    """The quota of cpu.cfs_quota_us and cpu.cfs_period_us; a quota of -1 means no limit."""
    with suppress(OSError, ValueError):
        time, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return time / period if time > 0 else math.inf
    return math.inf
