"""Densities of one scan over the voxels of its own lungs. The scan is neither registered nor filtered.

The lungs are those of the mask, which contains vessels and opacities but not the trachea.
"""

import numpy as np
from jaxtyping import Float, Int16

Voxels = Int16[np.ndarray, " n"] | Float[np.ndarray, " n"]


def low_attenuation_percent(hu: Voxels, threshold_hu: float) -> float:
    """LAA, low-attenuation area: the share of voxels below a threshold (%); NaN without voxels."""
    return 100 * float((hu < threshold_hu).mean()) if len(hu) else np.nan


def percentile_hu(hu: Voxels, percent: float = 15.0) -> float:
    """The HU below which ``percent`` per cent of the voxels lie; the 15th percentile is Perc15. NaN without voxels."""
    return float(np.percentile(hu, percent)) if len(hu) else np.nan


def mean_lung_density_hu(hu: Voxels) -> float:
    """MLD, mean lung density (HU); NaN without voxels."""
    return float(hu.mean(dtype=np.float64)) if len(hu) else np.nan


def mass_g(hu: Voxels, voxel_ml: float) -> float:
    """Mass of tissue and blood: air weighs nothing, 0 HU is 1 g/ml."""
    return float((hu.astype(np.float64) + 1000).sum()) * voxel_ml / 1000 if len(hu) else 0.0
