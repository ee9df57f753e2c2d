"""The viewer, NiiVue: a third-party library that is downloaded when the project is set up (`resultpages.fetch`).

If it is missing, or is not the tested file, pages have no viewer, only still pictures.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from .colours import Scale
from .volumes import nifti, packed

PACKAGE, VERSION = "@niivue/niivue", "0.69.0"
INTEGRITY = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
"""SHA-512 of the package, base64."""
MEMBER = "package/dist/niivue.umd.js"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
"""SHA-256 of the library file in the package."""
PLACE = Path(__file__).parent / "niivue" / "niivue.umd.js"
LICENCE = (Path(__file__).parent / "static" / "niivue-licence.txt").read_text(encoding="utf-8")
"""The licence, which must be shown wherever the library is."""
PARTS = (
    "gl-matrix, fflate, nifti-reader-js, array-equal, @lukeed/uuid and zarrita (MIT) and @ungap/structured-clone (ISC)"
)
"""Third-party libraries inside it."""


@dataclass(frozen=True)
class Library:
    """The text of NiiVue, and its form in the page."""

    source: str
    packed: str


@dataclass(frozen=True)
class Layer:
    """A volume that the viewer can show; all volumes of a page have one grid."""

    key: str
    title: str
    unit: str
    data: str
    """Packed NIfTI. 0: not shown; 1 to 255: from low to high."""
    low: float
    high: float
    logarithmic: bool
    colours: list[list[int]]
    """256 times red, green and blue."""


@functools.cache
def library(place: Path = PLACE) -> Library | None:
    """The downloaded library; None if there is none, or another file."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != SHA256:
        return None
    return Library(content.decode(), packed(content))


def layer(
    key: str,
    title: str,
    unit: str,
    values: Float[np.ndarray, "z y x"],
    scale: Scale,
    axes: Float[np.ndarray, "3 3"],
    origin: Float[np.ndarray, " 3"],
    levels: int = 255,
) -> Layer:
    """A volume in colours; NaN is not shown. ``axes`` and ``origin`` as for `nifti`.

    With fewer ``levels`` the values are rounded, which makes the page smaller.
    """
    return Layer(
        key,
        title,
        unit,
        packed(nifti(_bytes(values, scale, levels), axes, origin)),
        scale.low,
        scale.high,
        scale.logarithmic,
        scale.table().tolist(),
    )


def _bytes(values: Float[np.ndarray, "z y x"], scale: Scale, levels: int) -> UInt8[np.ndarray, "z y x"]:
    step = 254 / (levels - 1)
    shares = scale.share(np.nan_to_num(values, nan=scale.low))
    stored = 1 + np.round(np.round(shares * (levels - 1)) * step)
    return np.where(np.isnan(values), 0, stored).astype(np.uint8)
