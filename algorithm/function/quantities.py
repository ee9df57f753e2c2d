"""Every column of the table: name, unit and definition. docs/use/function.md repeats these definitions."""

from dataclasses import dataclass

from .prm import EMPHYSEMA, EMPTYING, FSAD, NAMES, NORMAL

THRESHOLDS_HU = (-950.0, -910.0, -856.0)
"""Thresholds of the low-attenuation areas."""
SCANS = {"in": "inspiration", "ex": "expiration"}


@dataclass(frozen=True)
class Quantity:
    """A column of the table."""

    key: str
    name: str
    unit: str
    digits: int
    """Digits after the decimal point in texts for readers."""
    definition: str
    shown: bool = True
    """Whether report.html shows it."""

    @property
    def title(self) -> str:
        """The name, with the unit where there is one."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float | None) -> str:
        """The value in the form that readers see; – for None."""
        return "–" if value is None else f"{value:.{self.digits}f}"


_VOLUMES = (
    *(
        Quantity(
            f"volume_{key}_l",
            f"Volume, {scan}",
            "l",
            2,
            f"The volume of the region in the scan at {scan}, by that scan's own lung mask or lobes.",
        )
        for key, scan in SCANS.items()
    ),
    Quantity("volume_change_l", "Volume change", "l", 2, "Volume at inspiration less volume at expiration."),
    Quantity(
        "volume_change_percent",
        "Volume change",
        "%",
        0,
        "The same as a share of the volume at expiration.",
    ),
    *(
        Quantity(
            f"field_volume_{key}_l",
            f"Volume by the field, {scan}",
            "l",
            2,
            f"The volume of the fixed scan's region at {scan}: in the fixed scan that of its voxels, in the moving one "
            "that of its voxels times the Jacobian determinant. Against the moving scan's own volume it is a check of "
            "the registration.",
            shown=False,
        )
        for key, scan in SCANS.items()
    ),
)
_COUNTED = (
    Quantity(
        "outside_percent",
        "Outside",
        "%",
        1,
        "The share of the region, by volume at expiration, that the moving scan does not show. It is in no measure "
        "below but those of one scan.",
    ),
    Quantity(
        "uncertain_percent",
        "Uncertain",
        "%",
        1,
        "The share of the region, by volume at expiration, that the moving scan shows, where an error of more than "
        "3 mm (--most-error-mm) is expected. Likewise left out.",
    ),
    Quantity(
        "left_out_percent",
        "Vessels, airways",
        "%",
        1,
        "The share of the region, by volume at expiration, that is certain, but above -500 HU (--ceiling-hu) or below "
        "-1024 HU (--floor-hu) in either scan after the median filter. Likewise left out.",
    ),
)
_VENTILATION = (
    Quantity(
        "saj",
        "SAJ",
        "",
        3,
        "Specific volume change, J - 1 (Ding et al. 2012): J is the Jacobian determinant of the map from expiration to "
        "inspiration. For a region it is the volume at inspiration over that at expiration, less 1.",
    ),
    Quantity(
        "saj_sd",
        "SAJ, standard deviation",
        "",
        3,
        "Standard deviation of J - 1 over the voxels of the region, each counting by its volume at expiration: how "
        "unevenly the lungs expand.",
    ),
    Quantity(
        "sacj",
        "SACJ",
        "",
        3,
        "Specific air volume change by the corrected Jacobian (Ding et al. 2012): J (1 - b_in) / (1 - b_ex) - 1, with "
        "the shares of tissue b = (HU + 1000) / 1055. For a region it is its air at inspiration over that at "
        "expiration, less 1. Mass-corrected.",
    ),
    Quantity(
        "sai",
        "SAI",
        "",
        3,
        "Specific air volume change by intensity (Simon 2000; Ding et al. 2012): b_ex (1 - b_in) / (b_in (1 - b_ex)) - "
        "1, with the shares of tissue averaged over the region. Mass-corrected. It equals SACJ where no tissue comes "
        "or goes.",
    ),
    Quantity(
        "mass_factor",
        "Mass correction",
        "",
        3,
        "What the densities (HU + 1000) of the inspiration are multiplied with for SACJ and SAI, so that all voxels of "
        "both lungs that count have the same mass in both scans; 1 with --mass-correction off.",
        shown=False,
    ),
)
_PRM = tuple(
    quantity
    for label, words in {
        NORMAL: "at least -950 HU at inspiration and at least -856 HU at expiration",
        FSAD: "at least -950 HU at inspiration and below -856 HU at expiration: functional small airways disease, air "
        "that is trapped without emphysema",
        EMPHYSEMA: "below -950 HU at inspiration and below -856 HU at expiration",
        EMPTYING: "below -950 HU at inspiration and at least -856 HU at expiration: the fourth quadrant, which should "
        "be nearly empty",
    }.items()
    for quantity in (
        Quantity(
            f"prm_{NAMES[label]}_ml",
            f"PRM {NAMES[label]}",
            "ml",
            0,
            f"Volume at expiration of the voxels that are {words} (Galbán et al. 2012), after a median filter of 3 × 3 "
            "× 3 voxels in each scan.",
            shown=False,
        ),
        Quantity(
            f"prm_{NAMES[label]}_percent",
            f"PRM {NAMES[label]}",
            "%",
            1,
            f"prm_{NAMES[label]}_ml as a share of the four classes together.",
        ),
    )
)
_DENSITY = tuple(
    quantity
    for key, scan in SCANS.items()
    for quantity in (
        *(
            Quantity(
                f"laa{-threshold:.0f}_{key}_percent",
                f"LAA {threshold:.0f}, {scan}",
                "%",
                1,
                f"Low-attenuation area: the share of the voxels below {threshold:.0f} HU in the scan at {scan} as it "
                "was read, in its own lungs; neither filtered nor registered.",
                shown=(key, threshold) in (("in", -950), ("ex", -856)),
            )
            for threshold in THRESHOLDS_HU
        ),
        Quantity(
            f"perc15_{key}_hu",
            f"Perc15, {scan}",
            "HU",
            0,
            f"The 15th percentile of these voxels at {scan}.",
            shown=key == "in",
        ),
        Quantity(f"mld_{key}_hu", f"Mean lung density, {scan}", "HU", 0, f"The mean of these voxels at {scan}."),
        Quantity(
            f"mass_{key}_g",
            f"Mass, {scan}",
            "g",
            0,
            f"The sum of (HU + 1000) / 1000 times the voxel's volume (ml) over these voxels at {scan}: tissue and "
            "blood. Between the scans it should hardly change.",
        ),
    )
)
_DEFORMATION = (
    *(
        Quantity(
            f"strain_{number}",
            f"Principal strain {number}",
            "",
            3,
            f"The {word} eigenvalue of the Green-Lagrange strain (FᵀF - I) / 2 from expiration to inspiration; mean "
            "over the region, each voxel counting by its volume at expiration.",
            shown=number == 1,
        )
        for number, word in ((1, "largest"), (2, "middle"), (3, "smallest"))
    ),
    Quantity(
        "adi",
        "ADI",
        "",
        3,
        "Anisotropic deformation index (Amelon et al. 2011), √(((λ₁ - λ₂) / λ₂)² + ((λ₂ - λ₃) / λ₃)²) with the "
        "principal stretches λ₁ ≥ λ₂ ≥ λ₃; 0 where the lung grows alike in all directions. Mean as above.",
    ),
    Quantity(
        "sri",
        "SRI",
        "",
        3,
        "Slab-rod index (Amelon et al. 2011), (2 / π) arctan(λ₃ (λ₁ - λ₂) / (λ₂ (λ₂ - λ₃))): 0 for growth in two "
        "directions, 1 for growth in one. Mean as above, without voxels that grow alike in all directions.",
    ),
)

QUANTITIES = (*_VOLUMES, *_COUNTED, *_VENTILATION, *_PRM, *_DENSITY, *_DEFORMATION)
"""In the order of the table's columns."""
