"""Thresholds and other settings of lung function."""

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import InputError

Scan = Literal["fixed", "moving"]
"""As in `result`, which is not imported here because that takes seconds."""

ALIKE = 1.03
"""If the lung volumes differ by a smaller factor, they do not show which scan is the inspiration."""
RATHER_ALIKE = 1.10
"""Below this factor there is a warning: two segmentations of the same lungs can differ by some per cent."""
TIDAL = 1.25
"""Below this factor the scans are probably not full inspiration and expiration, for which the PRM thresholds were
made."""


@dataclass(frozen=True)
class FunctionSettings:
    """Settings of lung function. HU are those of the scans after `filter_voxels`."""

    inspiration: Scan | None = None
    """The scan at inspiration; None: the scan with the larger lungs."""
    prm_inspiration_hu: float = -950.0
    """Threshold at inspiration; lower HU are emphysema (Galbán et al. 2012)."""
    prm_expiration_hu: float = -856.0
    """Threshold at expiration; lower HU are trapped air (Galbán et al. 2012)."""
    floor_hu: float = -1024.0
    """Voxels with lower HU in either scan are not lung. The noise of bullae reaches below -1000 HU."""
    ceiling_hu: float = -500.0
    """Voxels with higher HU in either scan are vessel, airway wall or opacity and are left out, as in PRM; other groups
    use -250 HU."""
    filter_voxels: int = 3
    """Edge of the cube of the median filter in voxels of the scan; 1: no filter."""
    tissue_hu: float = 55.0
    """HU of tissue without air, in the mixture of air and tissue (Yin et al. 2009); 0 gives Simon's (2000) formula."""
    most_error_mm: float = 3.0
    """A voxel is uncertain where the expected error is larger."""
    mass_correction: Literal["on", "off"] = "on"
    """Whether the density at inspiration is scaled so that both scans have the same lung mass, for SACJ and SAI."""

    def check(self) -> None:
        """InputError for invalid values."""
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
    "inspiration": "the scan at inspiration (default: the scan with the larger lungs)",
    "prm_inspiration_hu": "threshold at inspiration; lower HU are emphysema",
    "prm_expiration_hu": "threshold at expiration; lower HU are trapped air",
    "floor_hu": "voxels with lower HU in either scan are left out",
    "ceiling_hu": "voxels with higher HU in either scan are left out: vessels, airway walls, opacities",
    "filter_voxels": "edge of the cube of the median filter in voxels; 1: no filter",
    "tissue_hu": "HU of tissue without air, for SACJ and SAI",
    "most_error_mm": "voxels with a larger expected error are counted separately, as uncertain",
    "mass_correction": "scale the density at inspiration to equal lung mass, for SACJ and SAI",
}
assert HELP.keys() == {entry.name for entry in fields(FunctionSettings)}
