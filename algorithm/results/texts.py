"""Writes results.json and other text files, completely or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files.writing import atomically


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json, completely or not at all. NaN and ±inf become null: JSON has neither, and the platform drops
    them."""
    text = json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")  # a lone surrogate's \udcff is valid JSON


def paths_from(folder: Path, **files: Path) -> dict[str, str]:
    """Paths of files relative to a folder, by their names, for results.json; without files that do not exist (scans in
    memory)."""
    start = folder.resolve()
    return {name: os.path.relpath(file.resolve(), start) for name, file in files.items() if file.exists()}


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, completely or not at all; characters that UTF-8 cannot hold are escaped."""
    with atomically(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _plain(value: Any) -> Any:
    """The value in types that JSON supports; TypeError for other types."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"results hold a {type(value).__name__}, expected numbers, texts, lists and dicts with text keys")
