"""How many threads and how they wait: in the environment before torch is there, whatever is started."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from algorithm import cpus
from algorithm.cpus import cpu_quota, share_processors

ROOT = Path(__file__).parent.parent
NAMES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
ENTRIES = ("algorithm.__main__", "baselines.ruehaak", "training.train", "benchmarks.refinement", "phantom.__main__")


def group(monkeypatch: pytest.MonkeyPatch, root: Path, own: str, **files: str) -> None:
    """Control groups as the kernel shows them; `files` have `/` as `__` and `.` as `_dot_`."""
    (root / "self").write_text(own)
    for name, content in files.items():
        path = root / "fs" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(cpus, "OWN_CGROUPS", root / "self")
    monkeypatch.setattr(cpus, "CGROUPS", root / "fs")


V1 = "9:name=systemd:/\n1:cpu,cpuacct:/docker/0a\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu_dot_max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu_dot_max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/a/b\n", {"a__b__cpu_dot_max": "max 100000\n", "a__cpu_dot_max": "300000 100000\n"}, 3.0),
        ("0::/a\n", {"a__cpu_dot_max": "300000 100000\n", "cpu_dot_max": "50000 100000\n"}, 0.5),
        (V1, {"cpu__cpu_dot_cfs_quota_us": "200000\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}, 2.0),
        (V1, {"cpu__docker__0a__cpu_dot_cfs_quota_us": "1000", "cpu__docker__0a__cpu_dot_cfs_period_us": "4000"}, 0.25),
        (V1, {"cpu__cpu_dot_cfs_quota_us": "-1\n", "cpu__cpu_dot_cfs_period_us": "100000\n"}, math.inf),
        ("0::/\n", {"cpu_dot_max": "nonsense"}, math.inf),
        ("nonsense", {"cpu_dot_max": "1 1"}, math.inf),
    ],
)
def test_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, files: dict[str, str], quota: float) -> None:
    group(monkeypatch, tmp_path, own, **files)
    assert cpu_quota() == quota


def test_without_control_groups_there_is_no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpus, "OWN_CGROUPS", tmp_path / "none")
    assert cpu_quota() == math.inf


@pytest.mark.parametrize(("quota", "threads"), [(math.inf, None), (8.0, None), (2.5, "3"), (0.1, "1")])
def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float, threads: str | None) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    share_processors()
    assert [os.environ.get(name) for name in NAMES] == ["passive", threads, threads]


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "environ", dict(zip(NAMES, ("active", "5", "6"), strict=True)))
    share_processors()
    assert [os.environ[name] for name in NAMES] == ["active", "5", "6"]


@pytest.mark.parametrize("module", ENTRIES)
def test_it_is_settled_before_torch_loads(module: str) -> None:
    """In a process that notes the environment when something asks for torch."""
    program = (
        "import os, sys, importlib\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"importlib.import_module({module!r})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "passive\n"


def test_processors_that_may_not_be_used_have_no_threads() -> None:
    """PyTorch and SimpleITK count those that the process may run on."""
    program = (
        "import os, algorithm, torch, SimpleITK as sitk\n"
        "print(torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads())\n"
    )
    one = min(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}})\n{program}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1 1\n"
