"""Trained weights on disk: a safetensors file, and ``manifest.json`` beside it with the settings and the SHA-256.

Nothing is unpickled. The file is refused if its SHA-256 differs from the manifest's.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import InputError, out_of_memory
from ..fields.expected_error import ErrorModels
from ..files.writing import atomically
from .network import Cascade, CascadeSettings

FILE = "cascade.safetensors"
MANIFEST = "manifest.json"
ERRORS = "expected_error"
"""The manifest's entry for `ErrorModels`."""
PLATFORM = Path("/opt/ml/model")
"""Where grand-challenge.org unpacks an uploaded model."""
BUNDLED = Path(__file__).parents[2] / "weights"
"""Beside the code, in the repository and in the container."""
INSTALLED = Path(__file__).parents[1] / "bundled_weights"
"""In the wheel, which contains only the package folder."""


@dataclass(frozen=True)
class LoadedCascade:
    """A cascade in evaluation mode, the SHA-256 of its weights file, and the error models of its fields."""

    cascade: Cascade
    sha256: str
    errors: ErrorModels | None = None
    """Models of the expected error; None if the manifest has none."""


def find_weights(given: Path | None) -> Path:
    """The folder (or file in it) to load from: ``given``, else the platform's, else the one beside the code, else the
    one of the installed package."""
    if given is not None:
        return given
    return next((folder for folder in (PLATFORM, BUNDLED) if (folder / MANIFEST).exists()), INSTALLED)


def load_cascade(path: Path) -> LoadedCascade:
    """Load the cascade of a folder, or of a .safetensors file with its manifest beside it.

    InputError if the file does not agree with the manifest.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    manifest = manifest_of(path)
    file = folder / str(manifest["file"])
    if path.suffix == ".safetensors" and path.name != file.name:
        raise InputError(f"{path}: {folder / MANIFEST} describes {file.name}, not this file")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: the weights cannot be read ({error.strerror})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != manifest["sha256"]:
        raise InputError(
            f"{file}: the weights were altered: SHA-256 {sha256[:12]}…, manifest {str(manifest['sha256'])[:12]}…"
        )
    try:
        cascade = Cascade(CascadeSettings.from_dict(manifest["settings"]))
        cascade.load_state_dict({name: value.float() for name, value in load(content).items()})
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{file}: the weights do not fit the settings in {folder / MANIFEST}") from error
    errors = manifest.get(ERRORS)
    models = None if errors is None else ErrorModels.from_dict(errors)
    return LoadedCascade(cascade.eval().requires_grad_(False), sha256, models)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a folder, or of a .safetensors file; InputError if it is missing or incomplete."""
    return _read_manifest((path.parent if path.suffix == ".safetensors" else path) / MANIFEST)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        if not {"file", "sha256", "settings"} <= manifest.keys():
            raise ValueError("an entry is missing")
    except OSError as error:
        raise InputError(f"{path}: no weights found ({error.strerror})") from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected a JSON object with file, sha256 and settings") from error
    return dict(manifest)


def save_errors(folder: Path, models: ErrorModels, provenance: dict[str, Any]) -> None:
    """Add the models to the manifest in ``folder``; ``provenance`` says on which data they were fitted."""
    manifest = _read_manifest(folder / MANIFEST) | {ERRORS: asdict(models) | {"fitted": provenance}}
    with atomically(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


def save_cascade(folder: Path, cascade: Cascade, provenance: dict[str, Any]) -> None:
    """Write weights (half precision) and manifest; ``provenance`` is stored in the manifest as "training".

    Each of the two files is replaced completely or not at all. If only the weights were replaced, the old manifest
    refuses them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to(torch.float16).contiguous() for name, value in cascade.state_dict().items()}
    content = save(state)
    manifest = {
        "file": FILE,
        "sha256": hashlib.sha256(content).hexdigest(),
        "settings": cascade.settings.to_dict(),
        "training": provenance,
    }
    for name, data in ((FILE, content), (MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")):
        with atomically(folder / name) as file:
            file.write(data)
