"""The parametric response map: normal lung, functional small airways disease and emphysema, voxel by voxel.

Galbán et al. 2012 (Nat Med 18:1711). After a median filter and registration, a voxel is

    normal      inspiration ≥ -950 HU, expiration ≥ -856 HU
    fSAD        inspiration ≥ -950 HU, expiration < -856 HU     air trapped without emphysema
    emphysema   inspiration < -950 HU, expiration < -856 HU
    emptying    inspiration < -950 HU, expiration ≥ -856 HU     the fourth quadrant, which should be nearly empty

Voxels below the floor or above the ceiling in either scan are left out: airways and vessels.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from .settings import FunctionSettings

NORMAL, FSAD, EMPHYSEMA, EMPTYING, LEFT_OUT, UNCERTAIN = 1, 2, 3, 4, 5, 6
NAMES = {
    NORMAL: "normal",
    FSAD: "fsad",
    EMPHYSEMA: "emphysema",
    EMPTYING: "emptying",
    LEFT_OUT: "left_out",
    UNCERTAIN: "uncertain",
}
COLOURS = {
    NORMAL: (0, 158, 115),
    FSAD: (240, 228, 66),
    EMPHYSEMA: (213, 45, 0),
    EMPTYING: (204, 121, 167),
    LEFT_OUT: (150, 150, 150),
    UNCERTAIN: (60, 60, 60),
}
"""Red, green and blue. The first three classes have the colours of the literature, in shades that colour-blind people
can tell apart."""


def parenchyma(
    inspiration_hu: Float[np.ndarray, " n"], expiration_hu: Float[np.ndarray, " n"], settings: FunctionSettings
) -> Bool[np.ndarray, " n"]:
    """Voxels between the floor and the ceiling in both scans, floor and ceiling included."""
    low, high = settings.floor_hu, settings.ceiling_hu
    both = (inspiration_hu >= low) & (inspiration_hu <= high) & (expiration_hu >= low) & (expiration_hu <= high)
    inside: np.ndarray = np.asarray(both)
    return inside


def classes(
    inspiration_hu: Float[np.ndarray, " n"],
    expiration_hu: Float[np.ndarray, " n"],
    certain: Bool[np.ndarray, " n"],
    settings: FunctionSettings,
) -> UInt8[np.ndarray, " n"]:
    """The class of every voxel, from filtered HU; UNCERTAIN where it is not ``certain``."""
    emphysematous, trapped = inspiration_hu < settings.prm_inspiration_hu, expiration_hu < settings.prm_expiration_hu
    found = np.where(trapped, np.where(emphysematous, EMPHYSEMA, FSAD), np.where(emphysematous, EMPTYING, NORMAL))
    found = np.where(parenchyma(inspiration_hu, expiration_hu, settings), found, LEFT_OUT)
    return np.where(certain, found, UNCERTAIN).astype(np.uint8)


def colour_table() -> str:
    """The colour table for 3D Slicer (.ctbl): number, name, red, green, blue, opacity."""
    lines = ["# Color table file", f"# {len(NAMES) + 1} values", "0 outside_the_lungs 0 0 0 0"]
    lines += [f"{label} {name} {' '.join(map(str, COLOURS[label]))} 255" for label, name in NAMES.items()]
    return "\n".join(lines) + "\n"
