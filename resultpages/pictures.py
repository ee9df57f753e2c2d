"""Pictures as parts of a page, with their bytes in their address."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A picture on a page."""

    source: str
    """The address data:image/... with all bytes of the picture."""
    caption: str
    alt: str
    """A description for readers who cannot see the picture."""
    width: int = 0
    """Pixels."""
    height: int = 0


def picture(pixels: UInt8[np.ndarray, "y x 3"], caption: str, alt: str) -> Picture:
    """A picture of pixels, with the first row at the top."""
    height, width, _ = pixels.shape
    return Picture(jpeg(pixels), caption, alt, width, height)


def jpeg(pixels: UInt8[np.ndarray, "y x 3"], quality: int = 86) -> str:
    """Pixels as the address of an image."""
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(buffer, format="JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
