"""The files of one case. No large library is imported here, because the command line needs this module at every
start."""

from dataclasses import dataclass
from pathlib import Path

PLATFORM_FILE = "inputs.json"
"""The file in which grand-challenge.org names the input files."""


@dataclass(frozen=True)
class Inputs:
    """The files of one case; a scan may also be a folder with a DICOM series."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    platform: bool = False
    """Whether grand-challenge.org's inputs.json named them."""

    def paths(self) -> tuple[Path, ...]:
        """All files that are given."""
        return tuple(path for path in (self.fixed, self.moving, self.fixed_mask, self.moving_mask) if path)
