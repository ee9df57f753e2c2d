"""The files of one case. Nothing heavy is imported here: the command line needs it before it knows what to do."""

from dataclasses import dataclass
from pathlib import Path

PLATFORM_FILE = "inputs.json"
"""With which grand-challenge.org names them."""


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
        """All that are there."""
        return tuple(path for path in (self.fixed, self.moving, self.fixed_mask, self.moving_mask) if path)
