"""A pair as an /input folder, in each form that the algorithm accepts.

names        fixed.mha and moving.mha
folders      images/fixed/ and images/moving/, with one image of any name in each
socket       the layout of grand-challenge.org: inputs.json, and images with UUIDs as names
interface    the same layout before December 2025, when entries had no socket yet
"""

import json
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from algorithm.files.folders import SLUGS


def write_input(folder: Path, form: str, files: dict[str, Path]) -> None:
    """Copy the files (.mha) into ``folder``, which is emptied first.

    The roles are fixed, moving and, optionally, fixed-mask and moving-mask. ``form`` is one of `FORMS`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    FORMS[form](folder, files)


def _names(folder: Path, files: dict[str, Path]) -> None:
    for role, file in files.items():
        shutil.copyfile(file, folder / f"{role}.mha")


def _folders(folder: Path, files: dict[str, Path]) -> None:
    for role, file in files.items():
        _copy_into(folder / "images" / role, f"scan of {file.name}", file)


def _platform(folder: Path, files: dict[str, Path], keys: tuple[str, ...]) -> None:
    """Write inputs.json and its images. Every entry has its socket under each of ``keys``."""
    entries = []
    for number, (role, file) in enumerate(files.items(), start=1):
        name = str(uuid.uuid5(uuid.NAMESPACE_URL, role))
        _copy_into(folder / "images" / role, f"{name}.mha", file)
        image = {"pk": name, "name": f"phantom_{role}.mha"}
        sockets = dict.fromkeys(keys, _socket(number, role))
        entries.append({"pk": number, "value": None, "file": None, "image": image, **sockets})
    (folder / "inputs.json").write_text(json.dumps(entries, indent=2))


def _copy_into(folder: Path, name: str, file: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(file, folder / name)


def _socket(number: int, role: str) -> dict[str, Any]:
    """A socket with all entries of the platform."""
    mask = role.endswith("mask")
    return {
        "pk": number,
        "title": SLUGS[role].replace("-", " ").capitalize(),
        "slug": SLUGS[role],
        "kind": "Segmentation" if mask else "Image",
        "super_kind": "Image",
        "relative_path": f"images/{role}",
        "description": "",
        "default_value": None,
        "overlay_segments": [{"name": "Lungs", "visible": True, "voxel_value": 1}] if mask else [],
        "look_up_table": None,
    }


FORMS: dict[str, Callable[[Path, dict[str, Path]], None]] = {
    "names": _names,
    "folders": _folders,
    "socket": partial(_platform, keys=("socket", "interface")),
    "interface": partial(_platform, keys=("interface",)),
}
"""The function that writes each form."""
