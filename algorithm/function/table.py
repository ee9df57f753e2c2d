"""Computes the table from the voxels: every quantity of every region."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ..preparation.subject import Subject
from ..results.result import Scan
from .deformation import anisotropic_deformation_index, principal_strains, slab_rod_index
from .density import low_attenuation_percent, mass_g, mean_lung_density_hu, percentile_hu
from .prm import EMPHYSEMA, EMPTYING, FSAD, LEFT_OUT, NAMES, NORMAL, UNCERTAIN, classes
from .quantities import QUANTITIES, THRESHOLDS_HU
from .regions import LUNGS, Labels, Regions
from .settings import DEFAULT, FunctionSettings
from .ventilation import mass_factor, sacj, sai, saj, scaled, tissue_share
from .voxels import Case, Voxels, lung_values, voxels_of, which_is_inspiration

BLOCK = 2**20
"""Number of voxels that are processed together, so that intermediate values need little memory."""

Row = dict[str, float | None]
"""Values by the keys of `QUANTITIES`; None where there is no value."""


@dataclass(frozen=True)
class Measured:
    """The table, and the data for the images."""

    regions: dict[str, Row]
    inspiration: Scan
    warnings: tuple[str, ...]
    voxels: Voxels
    prm: UInt8[np.ndarray, " n"]
    mass_factor: float


@dataclass(frozen=True)
class _Scan:
    """One scan as it was read: the HU of the voxels in its own lungs."""

    hu: np.ndarray
    labels: Labels
    voxel_ml: float


def measured(case: Case, settings: FunctionSettings = DEFAULT) -> Measured:
    """All measurements; InputError if the scans are too similar, or the settings are invalid."""
    settings.check()
    litres = case.fixed.lungs.litres, case.moving.lungs.litres
    inspiration, warnings = which_is_inspiration(*litres, settings)
    voxels = voxels_of(case, inspiration, settings)
    certain = voxels.certain(settings.most_error_mm)
    prm = classes(voxels.inspiration_hu, voxels.expiration_hu, certain, settings)
    factor = _mass_factor(voxels, (prm != UNCERTAIN) & (prm != LEFT_OUT)) if settings.mass_correction == "on" else 1.0
    scans = [_scan(case.fixed, case.fixed_regions), _scan(case.moving, case.moving_regions)]
    first, then = scans if inspiration == "fixed" else scans[::-1]
    regions = {}
    for name in voxels.labels.names():
        row = _of_one_scan(first, "in", name) | _of_one_scan(then, "ex", name)
        row |= _changes(row) | _of_both(voxels, prm, voxels.labels.of(name), factor, settings)
        regions[name] = {quantity.key: row[quantity.key] for quantity in QUANTITIES}
    return Measured(regions, inspiration, tuple(warnings), voxels, prm, factor)


def _scan(subject: Subject, regions: Regions) -> _Scan:
    hu, labels = lung_values(subject, regions)
    return _Scan(hu, labels, float(np.prod(subject.image.grid.spacing)) / 1000)


def _mass_factor(voxels: Voxels, counts: Bool[np.ndarray, " n"]) -> float:
    """The mass factor of the voxels that count. Vessels, and the edge of the lungs where only one scan shows chest
    wall, are dense: with them, the factor would mostly describe these voxels."""
    ml = np.where(counts, voxels.expiration_ml, 0).astype(np.float64)
    inside = ml @ (voxels.expansion * (voxels.inspiration_hu + 1000.0))
    return mass_factor(float(inside), float(ml @ (voxels.expiration_hu + 1000.0)))


def _of_one_scan(scan: _Scan, key: str, region: str) -> Row:
    where = scan.labels.of(region)
    if not where.any():
        names = [f"laa{-t:.0f}_{key}_percent" for t in THRESHOLDS_HU]
        return dict.fromkeys([f"volume_{key}_l", *names, f"perc15_{key}_hu", f"mld_{key}_hu", f"mass_{key}_g"])
    hu = scan.hu[where]
    return {
        f"volume_{key}_l": len(hu) * scan.voxel_ml / 1000,
        **{f"laa{-t:.0f}_{key}_percent": low_attenuation_percent(hu, t) for t in THRESHOLDS_HU},
        f"perc15_{key}_hu": percentile_hu(hu),
        f"mld_{key}_hu": mean_lung_density_hu(hu),
        f"mass_{key}_g": mass_g(hu, scan.voxel_ml),
    }


def _changes(row: Row) -> Row:
    inside, outside = row["volume_in_l"], row["volume_ex_l"]
    if inside is None or outside is None:
        return {"volume_change_l": None, "volume_change_percent": None}
    return {"volume_change_l": inside - outside, "volume_change_percent": 100 * (inside / outside - 1)}


def _of_both(
    voxels: Voxels, prm: UInt8[np.ndarray, " n"], where: Bool[np.ndarray, " n"], factor: float,
    settings: FunctionSettings,
) -> Row:  # fmt: skip
    """The quantities that need the map. For a region in which no voxel counts, only the shares of voxels that do not
    count."""
    ml, seen, label = voxels.expiration_ml[where].astype(np.float64), voxels.seen[where], prm[where]
    expansion, total = voxels.expansion[where].astype(np.float64), ml.sum()
    row: Row = {
        "field_volume_in_l": float(ml @ expansion) / 1000,
        "field_volume_ex_l": float(total) / 1000,
        "outside_percent": 100 * float(ml[~seen].sum() / total),
        "uncertain_percent": 100 * float(ml[seen & (label == UNCERTAIN)].sum() / total),
        "left_out_percent": 100 * float(ml[label == LEFT_OUT].sum() / total),
        "mass_factor": factor,
    }
    counts = (label != UNCERTAIN) & (label != LEFT_OUT)
    row |= _prm_volumes(label, ml)
    if not counts.any():
        return row | dict.fromkeys(("saj", "saj_sd", "sacj", "sai", "strain_1", "strain_2", "strain_3", "adi", "sri"))
    hu = [of[where][counts] for of in (voxels.inspiration_hu, voxels.expiration_hu)]
    row |= _ventilation(ml[counts], expansion[counts], np.asarray(scaled(hu[0], factor)), hu[1], settings.tissue_hu)
    return row | _deformation(voxels.stretches[where][counts], ml[counts])


def _prm_volumes(label: UInt8[np.ndarray, " n"], ml: Float[np.ndarray, " n"]) -> Row:
    volumes = {NAMES[of]: float(ml[label == of].sum()) for of in (NORMAL, FSAD, EMPHYSEMA, EMPTYING)}
    total = sum(volumes.values())
    row: Row = {f"prm_{name}_ml": volume for name, volume in volumes.items()}
    row |= {f"prm_{name}_percent": 100 * volume / total if total else None for name, volume in volumes.items()}
    return row


def _ventilation(
    ml: Float[np.ndarray, " n"],
    expansion: Float[np.ndarray, " n"],
    inspiration_hu: Float[np.ndarray, " n"],
    expiration_hu: Float[np.ndarray, " n"],
    tissue_hu: float,
) -> Row:
    """Ventilation of the region as a whole: the HU are first averaged over its volume in each scan."""
    volume_ex, volume_in = ml.sum(), ml @ expansion
    share_in = tissue_share((ml * expansion) @ inspiration_hu / volume_in, tissue_hu)
    share_ex = tissue_share(ml @ expiration_hu / volume_ex, tissue_hu)
    change = saj(volume_in / volume_ex)
    return {
        "saj": float(change),
        "saj_sd": float(np.sqrt(ml @ (saj(expansion) - change) ** 2 / volume_ex)),
        "sacj": _finite(sacj(volume_in / volume_ex, share_in, share_ex)),
        "sai": _finite(sai(share_in, share_ex)),
    }


def _deformation(stretches: Float[np.ndarray, "n 3"], ml: Float[np.ndarray, " n"]) -> Row:
    """Means, computed block by block: in double precision, all voxels at once would need one or two GB."""
    strains, index, slab, known = np.zeros(3), 0.0, 0.0, 0.0
    for start in range(0, len(ml), BLOCK):
        part, weights = stretches[start : start + BLOCK].astype(np.float64), ml[start : start + BLOCK]
        strains += weights @ principal_strains(part)
        index += weights @ anisotropic_deformation_index(part)
        of = slab_rod_index(part)
        there = np.isfinite(of)
        slab, known = slab + weights[there] @ of[there], known + weights[there].sum()
    return {
        **{f"strain_{n}": float(strains[3 - n] / ml.sum()) for n in (1, 2, 3)},
        "adi": float(index / ml.sum()),
        "sri": float(slab / known) if known else None,
    }


def _finite(value: np.ndarray | float) -> float | None:
    return float(value) if np.isfinite(value) else None


def lungs_row(found: Measured) -> Row:
    """The row of both lungs."""
    return found.regions[LUNGS]
