"""How many threads, and how they wait: settled before torch is loaded, since OpenMP reads it when it loads.

This module imports nothing but the standard library.
"""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def share_processors() -> None:
    """Sets environment variables for OpenMP (torch) and ITK, those that the user has not set.

    Threads that wait for each other sleep. By default they spin, for milliseconds: as soon as anything else runs on the
    processors, they keep from working the very thread that they wait for.

    No more threads than processors by the container's quota. The processors that the process may run on at all
    (taskset, cpuset) both libraries count themselves.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    quota = cpu_quota()
    if quota < (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
        threads = str(max(1, math.ceil(quota)))
        os.environ.setdefault("OMP_NUM_THREADS", threads)
        os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", threads)


def take_threads(number: int) -> None:
    """So many threads for all libraries, whatever was set before; one that is loaded already does not notice."""
    for name in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(number)


def cpu_quota() -> float:
    """Processors' worth of time that the control groups of this process allow; inf without a limit, or elsewhere."""
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
    """The group's folder and those above it, each of which may limit; in a container often only the root is there."""
    group = root / path.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder == root or root in folder.parents]


def _quota_v2(folder: Path) -> float:
    """cpu.max holds the time and the period, or "max" for the time."""
    with suppress(OSError, ValueError):
        time, period = (folder / "cpu.max").read_text().split()
        return math.inf if time == "max" else int(time) / int(period)
    return math.inf


def _quota_v1(folder: Path) -> float:
    """-1 is no limit."""
    with suppress(OSError, ValueError):
        time, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return time / period if time > 0 else math.inf
    return math.inf
