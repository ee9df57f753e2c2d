"""Colours for values: scales that people with any colour vision can read, and that keep their order in grey."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

LEAST_TO_MOST = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
"""Viridis, at ten positions."""
GOOD_TO_BAD = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
    *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
"""Cividis, at ten positions."""
LESS_OR_MORE = ("#053061", "#2166ac", "#67a9cf", "#f7f7f7", "#f0a35a", "#c8620b", "#6b3002")
"""Blue below the middle, white in the middle, orange above."""
GREY = ("#000000", "#ffffff")
FOLDED_RGB = (217, 0, 217)
"""Magenta, which is not in any of the scales."""


@dataclass(frozen=True)
class Scale:
    """Maps values to colours; values beyond its ends have the colours of the ends."""

    low: float
    high: float
    colours: tuple[str, ...]
    """Colours as #rrggbb, evenly spaced from low to high."""
    logarithmic: bool = False
    """Whether the scale is logarithmic: 1/2 lies as far from 1 as 2 does."""

    def share(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The positions of the values between low (0) and high (1)."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high = np.log(low), np.log(high)
            values = np.log(np.maximum(values, self.low))
        shares: np.ndarray = np.clip((values - low) / (high - low), 0.0, 1.0)
        return shares

    def table(self, number: int = 256) -> UInt8[np.ndarray, "n 3"]:
        """Red, green and blue at ``number`` positions from low to high."""
        stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in self.colours], float)
        at, places = np.linspace(0, 1, number), np.linspace(0, 1, len(stops))
        return np.round(np.stack([np.interp(at, places, stops[:, c]) for c in range(3)], axis=1)).astype(np.uint8)

    def rgb(self, values: Float[np.ndarray, "y x"]) -> UInt8[np.ndarray, "y x 3"]:
        """The colours of the values."""
        coloured: np.ndarray = self.table()[np.round(255 * self.share(values)).astype(np.uint8)]
        return coloured


CT = Scale(-1000.0, 200.0, GREY)
"""HU."""
DIFFERENCE = Scale(-500.0, 500.0, GREY)
"""HU; mid grey is no difference."""
VOLUME = Scale(0.4, 2.5, LESS_OR_MORE, logarithmic=True)
"""The Jacobian determinant: white is 1, no change of volume."""


def over(
    picture: UInt8[np.ndarray, "y x 3"],
    colours: UInt8[np.ndarray, "y x 3"],
    where: Bool[np.ndarray, "y x"],
    opacity: float = 0.6,
) -> UInt8[np.ndarray, "y x 3"]:
    """A picture with a colour overlay on a part of it."""
    mixed = np.where(where[..., None], (1 - opacity) * picture + opacity * colours, picture)
    return np.round(mixed).astype(np.uint8)
