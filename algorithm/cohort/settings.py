"""Settings of a cohort: `lungreg cohort` writes them to OUT/cohort.json, the only configuration of the workflow."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..options import Device, FieldGrid, Options, Page, Refine, Switch

CONFIG = "cohort.json"
STEPS = ("check", "register", "apply", "function", "evaluate")
"""The steps in their order; the workflow has a rule for each."""
CONTAINER = "lung-registration.sif"
IN_CONTAINER = "env PYTHONPATH=/opt/app python -m algorithm.command"
"""The command inside the container of the algorithm."""


@dataclass(frozen=True)
class Settings:
    """The configuration of a cohort."""

    table: str
    """Absolute path of the table."""
    package: str
    """The name of this package: algorithm, or lungreg where it is installed."""
    lungreg: str
    """The command for a shell."""
    worker: str
    """The command where the workers run, for example in a container."""
    weights_sha256: str
    chunks: int
    """Number of chunks of pairs, a power of two."""
    weights: str | None = None
    refine: Refine = Options.refine
    device: Device = Options.device
    field_grid: FieldGrid = Options.field_grid
    transforms: Switch = "on"
    report: Page = "on"
    function: bool = False
    """Whether `lungreg function` is run on every result."""
    threads: int = 1
    """Threads of one worker."""
    mem_mb: int = 4000
    """Memory (MB) of one worker at its first attempt."""
    minutes: int = 10
    """Minutes that a pair may take at the first attempt, for schedulers that ask for it."""
    gpus: int = 0
    """GPUs of one worker."""
    container: str = CONTAINER

    def results_follow_from(self) -> dict[str, Any]:
        """The settings that the results depend on. The device does not count: a cohort may run on CPUs and GPUs."""
        names = ("weights_sha256", "refine", "field_grid", "transforms", "report")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Settings":
        """The settings from cohort.json; InputError if an entry is missing."""
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{name: value for name, value in entries.items() if name in known})
        except TypeError as error:
            raise InputError(f"{CONFIG}: {error}, expected what lungreg cohort writes") from error

    def to_json(self) -> str:
        """The content of cohort.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_settings(out: Path) -> Settings:
    """The settings in the folder of a cohort; InputError if there are none."""
    try:
        return Settings.from_dict(json.loads((out / CONFIG).read_bytes()))
    except OSError as error:
        raise InputError(
            f"{out / CONFIG}: cannot be read ({error.strerror}), expected the folder of a cohort"
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{out / CONFIG}: is no JSON object, expected what lungreg cohort writes") from error
