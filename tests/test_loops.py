"""Compiled loops: stored ones are loaded from a folder that cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from algorithm.loops import PROCESSOR

ROOT = Path(__file__).parent.parent

LOADED = """
import shutil, sys, tempfile
sys.path.insert(0, sys.argv[1])
from algorithm.geometry import warp_loop
hits = [sum(d.stats.cache_hits.values()) for d in (warp_loop.warp_rows, warp_loop._cells)]
print(hits, warp_loop.warp_rows.targetctx.codegen()._get_host_cpu_name())
"""

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the processor has no AVX2"
)


def loaded(app: Path, temporary: Path, **environment: str) -> str:
    """What a process says that imports the loops of ``app``: loads from the store, and the processor."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "LUNGREG"))}
    given = kept | {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", LOADED, str(app)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=given, cwd="/").stdout.strip()


def test_loops_of_an_image_are_loaded_and_nothing_is_left(tmp_path: Path) -> None:
    temporary, store, app = (tmp_path / name for name in ("temporary", "store", "app"))
    temporary.mkdir()
    app.mkdir()
    for folder in ("algorithm", "imagefiles"):
        (app / folder).symlink_to(ROOT / folder)
    named = {"NUMBA_CPU_NAME": PROCESSOR, "NUMBA_CPU_FEATURES": ""}
    assert loaded(app, temporary, NUMBA_CACHE_DIR=str(store), **named) == f"[0, 0] {PROCESSOR}"
    files = {path.relative_to(store) for path in store.rglob("*.nb?")}
    assert files
    assert loaded(app, temporary, LUNGREG_LOOPS=str(store)) == f"[1, 1] {PROCESSOR}"
    assert list(temporary.iterdir()) == []
    assert {path.relative_to(store) for path in store.rglob("*.nb?")} == files


def test_without_them_the_loops_are_compiled(tmp_path: Path) -> None:
    said = loaded(ROOT, tmp_path, LUNGREG_LOOPS=str(tmp_path / "none"), NUMBA_CACHE_DIR=str(tmp_path / "own"))
    assert said.startswith("[0, 0] ") and PROCESSOR not in said
