"""plastimatch as a second opinion, where it is installed (`pip install plastimatch`)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = shutil.which("plastimatch", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

needs_plastimatch = pytest.mark.skipif(PROGRAM is None, reason="plastimatch is not installed")


def plastimatch(*arguments: object) -> None:
    """Runs it; what it says stands in the failure."""
    assert PROGRAM is not None
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
