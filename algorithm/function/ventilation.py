"""Ventilation from two scans: how much the air of a place grows from the expiration to the inspiration, as a share.

Ding et al. 2012 (Med Phys 39(8):5084) compare three measures of ΔV_air / V_air,ex. With J the inspiratory over the
expiratory volume, and b the share of tissue in a voxel, by a mixture of air (-1000 HU) and tissue (55 HU, Yin et al.
2009, Med Phys 36(9):4213),

    SAJ  = J - 1                                        all of the volume is taken for air
    SACJ = J (1 - b_in) / (1 - b_ex) - 1                the air's share comes from the HU
    SAI  = b_ex (1 - b_in) / (b_in (1 - b_ex)) - 1      from the HU alone

SAI is SACJ where no tissue comes or goes, b_in J = b_ex. With 0 HU for tissue it is Simon's (2000) formula,
1000 (HU_in - HU_ex) / (HU_ex (HU_in + 1000)). For a region, b are means over its volume, so that noise in single
voxels, which the ratios would turn into a bias, is gone before: the region is taken as one region of interest.
"""

import numpy as np
from jaxtyping import Float

AIR_HU = -1000.0

Values = Float[np.ndarray, "..."] | float


def tissue_share(hu: Values, tissue_hu: float) -> Values:
    """b = (HU + 1000) / (HU_tissue + 1000): 0 for air, 1 for tissue. Linear, so a mean's is the mean."""
    share: Values = (np.asarray(hu) - AIR_HU) / (tissue_hu - AIR_HU)
    return share


def saj(expansion: Values) -> Values:
    """J - 1, the specific volume change; ``expansion`` is J, inspiration over expiration."""
    change: Values = np.asarray(expansion) - 1
    return change


def sacj(expansion: Values, inspiration: Values, expiration: Values) -> Values:
    """The specific air volume change by the corrected Jacobian; of shares of tissue at inspiration and expiration."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change: Values = np.asarray(expansion) * (1 - inspiration) / (1 - np.asarray(expiration)) - 1
    return change


def sai(inspiration: Values, expiration: Values) -> Values:
    """The specific air volume change by intensity; of shares of tissue. Infinite where the inspiration has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sacj(np.asarray(expiration) / inspiration, inspiration, expiration)


def mass_factor(inspiration_mass: float, expiration_mass: float) -> float:
    """By which the inspiration's densities are multiplied so that both lungs weigh the same: m_ex / m_in.

    Blood comes with inspiration, and scanners are not calibrated alike; the measures by intensity take that for air
    (Guerrero et al. 2006, Phys Med Biol 51(4):777).
    """
    return expiration_mass / inspiration_mass if inspiration_mass > 0 else 1.0


def scaled(hu: Values, factor: float) -> Values:
    """HU of the same voxels with ``factor`` times the density, HU + 1000."""
    values: Values = (np.asarray(hu) - AIR_HU) * factor + AIR_HU
    return values
