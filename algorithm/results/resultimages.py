"""Finds the images of a result."""

from pathlib import Path

from ..errors import InputError
from ..files.folders import images_in


def find_image(folder: Path, kind: str) -> Path | None:
    """The image of a kind (see `KINDS`) in the folder of a result; None without one. InputError for several."""
    found = images_in(folder / "images" / kind)
    if len(found) > 1:
        raise InputError(f"{folder}: has {len(found)} images in images/{kind}, expected one")
    return found[0] if found else None
