"""Ventilation from two scans: the relative change of the air volume of a place from expiration to inspiration.

Ding et al. 2012 (Med Phys 39(8):5084) compare three measures of ΔV_air / V_air,ex. J is the inspiratory volume over the
expiratory volume. b is the share of tissue in a voxel, in a mixture of air (-1000 HU) and tissue (55 HU, Yin et al.
2009, Med Phys 36(9):4213).

    SAJ  = J - 1                                        the whole volume counts as air
    SACJ = J (1 - b_in) / (1 - b_ex) - 1                the share of air comes from the HU
    SAI  = b_ex (1 - b_in) / (b_in (1 - b_ex)) - 1      from the HU alone

SAI equals SACJ where the tissue does not change, b_in J = b_ex. With 0 HU for tissue it is Simon's (2000) formula,
1000 (HU_in - HU_ex) / (HU_ex (HU_in + 1000)). For a region, b is the mean over its volume: the
ratios would turn the noise of single voxels into a bias.
"""

import numpy as np
from jaxtyping import Float

AIR_HU = -1000.0

Values = Float[np.ndarray, "..."] | float


def tissue_share(hu: Values, tissue_hu: float) -> Values:
    """b = (HU + 1000) / (HU_tissue + 1000): 0 for air, 1 for tissue. It is linear, so the share of a mean HU is the
    mean share."""
    share: Values = (np.asarray(hu) - AIR_HU) / (tissue_hu - AIR_HU)
    return share


def saj(expansion: Values) -> Values:
    """J - 1, the specific volume change; ``expansion`` is J, the volume at inspiration over that at expiration."""
    change: Values = np.asarray(expansion) - 1
    return change


def sacj(expansion: Values, inspiration: Values, expiration: Values) -> Values:
    """The specific air volume change by the corrected Jacobian, from the shares of tissue at inspiration and
    expiration."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change: Values = np.asarray(expansion) * (1 - inspiration) / (1 - np.asarray(expiration)) - 1
    return change


def sai(inspiration: Values, expiration: Values) -> Values:
    """The specific air volume change by intensity, from shares of tissue. Infinite where the inspiration has no
    tissue."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sacj(np.asarray(expiration) / inspiration, inspiration, expiration)


def mass_factor(inspiration_mass: float, expiration_mass: float) -> float:
    """The factor m_ex / m_in. Multiplying the densities at inspiration by it gives both scans the same lung mass.

    Inspiration brings blood, and scanners are calibrated differently; the measures by intensity would count this as air
    (Guerrero et al. 2006, Phys Med Biol 51(4):777).
    """
    return expiration_mass / inspiration_mass if inspiration_mass > 0 else 1.0


def scaled(hu: Values, factor: float) -> Values:
    """HU of the same voxels with ``factor`` times the density, HU + 1000."""
    values: Values = (np.asarray(hu) - AIR_HU) * factor + AIR_HU
    return values
