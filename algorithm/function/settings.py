"""Thresholds and what else can be chosen."""

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import InputError

Scan = Literal["fixed", "moving"]
"""As in `result`, which takes seconds to load."""

ALIKE = 1.03
"""Lungs whose volumes differ by a smaller factor do not tell which scan is the inspiration."""
RATHER_ALIKE = 1.10
"""Below this factor a warning says so: of the lungs of one patient two segmentations can differ by some per cent."""
TIDAL = 1.25
"""Below this factor the scans are hardly full inspiration and expiration, which PRM's thresholds are made for."""


@dataclass(frozen=True)
class FunctionSettings:
    """How lung function is measured. HU are those of the scans after `filter_voxels`."""

    inspiration: Scan | None = None
    """Which scan it is; None: the one with the larger lungs."""
    prm_inspiration_hu: float = -950.0
    """Emphysema lies below, at inspiration (Galbán et al. 2012)."""
    prm_expiration_hu: float = -856.0
    """Trapped air lies below, at expiration (Galbán et al. 2012)."""
    floor_hu: float = -1024.0
    """Less in either scan is no lung. The noise of bullae reaches below -1000 HU."""
    ceiling_hu: float = -500.0
    """More in either scan is vessel, airway wall or opacity, and left out, as in PRM; other groups take -250 HU."""
    filter_voxels: int = 3
    """Edge of the cube of the median filter, voxels of the scan; 1: none."""
    tissue_hu: float = 55.0
    """Of tissue without air, in the mixture of air and tissue (Yin et al. 2009); 0 gives Simon's (2000) formula."""
    most_error_mm: float = 3.0
    """Where a larger error is expected, a place is uncertain."""
    mass_correction: Literal["on", "off"] = "on"
    """Whether the inspiration's density is scaled so that both lungs have the same mass, for SACJ and SAI."""

    def check(self) -> None:
        """InputError for values that make no sense."""
        if self.filter_voxels < 1 or self.filter_voxels % 2 == 0:
            raise InputError(f"--filter-voxels is {self.filter_voxels}, expected an odd number from 1 on")
        if not self.floor_hu < min(self.prm_inspiration_hu, self.prm_expiration_hu):
            raise InputError(f"--floor-hu is {self.floor_hu:g}, expected less than both thresholds of the PRM")
        if not max(self.prm_inspiration_hu, self.prm_expiration_hu) < self.ceiling_hu < self.tissue_hu:
            raise InputError(
                f"--ceiling-hu is {self.ceiling_hu:g}, expected more than both thresholds of the PRM and less than "
                f"--tissue-hu, {self.tissue_hu:g}"
            )
        if not self.most_error_mm > 0:
            raise InputError(f"--most-error-mm is {self.most_error_mm:g}, expected more than 0")


DEFAULT = FunctionSettings()
HELP = {
    "inspiration": "which scan it is (default: the one with the larger lungs)",
    "prm_inspiration_hu": "emphysema lies below, at inspiration",
    "prm_expiration_hu": "trapped air lies below, at expiration",
    "floor_hu": "less in either scan is left out",
    "ceiling_hu": "more in either scan is left out: vessels, airway walls, opacities",
    "filter_voxels": "edge of the median filter's cube; 1: no filter",
    "tissue_hu": "of tissue without air, for SACJ and SAI",
    "most_error_mm": "places where a larger error is expected are counted apart",
    "mass_correction": "scale the inspiration's density to equal mass, for SACJ and SAI",
}
assert HELP.keys() == {entry.name for entry in fields(FunctionSettings)}
