"""Every pair is registered once for all tables and figures: what lies in OUT already is used again."""

import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import SimpleITK as sitk

from algorithm.cascade.weights import find_weights, manifest_of
from benchmarks.landmarks import BASELINES, FIELD, command
from evaluation.tables import write_json

from .pairs import Pair

log = logging.getLogger(__name__)

T = TypeVar("T")

NAMES = {
    "initial": "before registration",
    "affine": "pre-alignment",
    "off": "our cascade",
    "full": "ours, refined (full)",
    "ruehaak": "Rühaak et al. 2017, rebuilt",
}
"""Of the methods, for people."""
Fields = dict[str, dict[Pair, Path | str]]
"""By method and pair: the file with the field, or the sentence why there is none."""
MADE_FROM = "made_from.json"
"""Beside a result: what it was made from. Written last, so that it says the result is whole."""


@dataclass(frozen=True)
class Runs:
    """Where results are kept, and with what they are made."""

    out: Path
    device: str = "auto"
    weights: Path | None = None

    def folder(self, method: str, pair: Pair) -> Path:
        """Of a result."""
        return self.out / "fields" / method / pair.name

    def register(self, methods: Sequence[str], pairs: Sequence[Pair]) -> dict[tuple[str, str], str]:
        """Registers every pair by every method, but what is there; the sentences of those that failed.

        ``methods`` are off and full (``--refine``) and ruehaak.
        """
        wanted = [(method, pair) for pair in pairs for method in methods]
        todo = [one for one in wanted if not self._there(*one)]
        if wanted:
            log.info("%d registrations, %d of them are there already", len(wanted), len(wanted) - len(todo))
        failed = {}
        for method, pair in counted(todo, lambda one: f"{one[1].name}, {NAMES[one[0]]}"):
            if sentence := self._run(method, pair):
                failed[method, pair.name] = sentence
                log.warning("%s: %s", pair.name, sentence)
        return failed

    def _run(self, method: str, pair: Pair) -> str:
        """Empty, or why it failed."""
        out = self.folder(method, pair)
        out.mkdir(parents=True, exist_ok=True)
        (out / MADE_FROM).unlink(missing_ok=True)
        code, said = run(self._command(method, pair, out))
        if code == 0:
            self.note(out, self._asked(method, pair))
        return "" if code == 0 else said or f"exit code {code}"

    def _command(self, method: str, pair: Pair, out: Path) -> list[str]:
        device = f"--device={self.device}"
        if method in BASELINES:
            return command(method, pair.folder, out, [device])
        weights = [f"--weights={self.weights}"] if self.weights else []
        return command("algorithm", pair.folder, out, [device, f"--refine={method}", "--report=off", *weights])

    def _asked(self, method: str, pair: Pair) -> dict[str, str]:
        weights = "" if method in BASELINES else str(manifest_of(find_weights(self.weights))["sha256"])
        return self.made_from(pair, method, weights)

    def _there(self, method: str, pair: Pair) -> bool:
        return self.there(self.folder(method, pair), self._asked(method, pair))

    def made_from(self, pair: Pair, method: str, weights_sha256: str) -> dict[str, str]:
        """All that a result depends on, but the code."""
        scans = {scan: sha256(pair.folder / f"{scan}.mha") for scan in ("fixed", "moving")}
        return {**scans, "method": method, "weights": weights_sha256, "device": self.device}

    def there(self, folder: Path, made_from: dict[str, str]) -> bool:
        """Whether a folder holds the whole result of just that."""
        try:
            return bool(json.loads((folder / MADE_FROM).read_text()) == made_from)
        except (OSError, ValueError):
            return False

    def note(self, folder: Path, made_from: dict[str, str]) -> None:
        """Says that the result in a folder is whole."""
        write_json(folder / MADE_FROM, made_from)

    def field(self, method: str, pair: Pair) -> Path:
        """The displacement field of a result."""
        return self.folder(method, pair) / FIELD / "fixed.mha"

    def said(self, method: str, pair: Pair) -> dict[str, Any]:
        """results.json of a result."""
        found: dict[str, Any] = json.loads((self.folder(method, pair) / "results.json").read_text())
        return found

    def has(self, method: str, pair: Pair) -> bool:
        """Whether there is a result."""
        return (self.folder(method, pair) / "results.json").is_file()

    def affine(self, pair: Pair, method: str = "full") -> Path:
        """The pre-alignment of a result as a transform in a file, which the evaluation reads as any other."""
        found = self.said(method, pair)["prealignment"]
        transform = sitk.AffineTransform(3)
        transform.SetMatrix([value for row in found["matrix"] for value in row])
        transform.SetTranslation(found["offset"])
        path = self.out / "fields" / "affine" / f"{pair.name}.tfm"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteTransform(transform, str(path))
        return path


def run(arguments: list[str]) -> tuple[int, str]:
    """A command's exit code, and the last line that it said on stderr."""
    done = subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def counted(items: Sequence[T], name: Callable[[T], str]) -> Iterable[T]:
    """The items one by one; after each, the log says how many are done, and how long the rest will take."""
    start = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        passed = time.monotonic() - start
        rest = passed / number * (len(items) - number)
        log.info("%d/%d %s; %.0f s, %.0f min left", number, len(items), name(item), passed, rest / 60)


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
