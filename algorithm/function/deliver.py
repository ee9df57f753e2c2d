"""``lungreg function``: reads a result and its scans; writes table, images and the section of report.html."""

import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from resultpages.page import with_section

from .. import __version__
from ..fields.expected_error import ExpectedError
from ..files.writing import write_image_slabs
from ..geometry import slabs
from ..pages.view import Pair
from ..report import Report
from ..results.outputs import sole_writer
from ..results.ownership import (
    FUNCTION,
    FUNCTION_COLOURS,
    FUNCTION_IMAGES,
    FUNCTION_MARK,
    PAGE,
    check_function,
    is_own_page,
    result_mark,
)
from ..results.result import Result, read_result
from ..results.scans import registered_scan
from ..results.texts import write_results, write_text
from .deformation import anisotropic_deformation_index, slab_rod_index
from .prm import LEFT_OUT, UNCERTAIN, colour_table
from .quantities import QUANTITIES
from .regions import regions_of
from .report import section
from .settings import DEFAULT, FunctionSettings
from .table import Measured, lungs_row, measured
from .ventilation import sacj, sai, saj, scaled, tissue_share
from .voxels import Case, ErrorAt

NOTHING = -1.0
"""Value in images of numbers where there is no measurement; no measure can be as low."""
HIGHEST = 10.0
"""Maximum of the ventilation in images: in a voxel without tissue it would be infinite."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """Files that the result does not hold, as given by the user."""

    fixed: Path | None = None
    moving: Path | None = None
    """None: the path in results.json."""
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    """None: the lungs that the result holds, or else lungs made from the HU."""
    fixed_lobes: Path | None = None
    moving_lobes: Path | None = None


def function(folder: Path, given: Given = Given(), settings: FunctionSettings = DEFAULT) -> str:
    """Measure lung function of a result and write it into the result folder; returns a summary of a few lines.

    InputError for mistakes that the user can correct. Only files of an earlier call are replaced.
    """
    settings.check()
    report = Report(["read", "function", "write function"])
    with report.timed("read"):
        result = read_result(folder)
        check_function(folder)
        case = read_case(folder, result, given)
    with report.timed("function"):
        found = measured(case, settings)
    with report.timed("write function"), sole_writer(folder):
        check_function(folder)
        names = {scan: str(result.figures.get(scan, "unnamed")) for scan in ("fixed", "moving")}
        page = write_function(folder, found, settings, names)
        if is_own_page(folder / PAGE):
            text = with_section((folder / PAGE).read_text(encoding="utf-8"), page)
            write_text(folder / PAGE, text)
    for sentence in found.warnings:
        log.warning(sentence)
    return in_words(folder, found, names)


def read_case(folder: Path, result: Result, given: Given) -> Case:
    """Both scans with their lungs; InputError if they are not found, or are not the scans that were registered."""
    fixed = registered_scan(folder, result, "fixed", given.fixed, given.fixed_mask)
    moving = registered_scan(folder, result, "moving", given.moving, given.moving_mask)
    return Case(
        fixed,
        moving,
        result.transform,
        regions_of(fixed.lungs, given.fixed_lobes),
        regions_of(moving.lungs, given.moving_lobes),
        _error_on(result.expected),
    )


def _error_on(expected: ExpectedError | None) -> ErrorAt | None:
    """The expected error (mm) on any grid of the fixed world, as `Case` wants it."""
    return None if expected is None else lambda grid: expected.at(grid)[0, 0].numpy()


# --- writing ---------------------------------------------------------------------------------------------------------


def also_function(folder: Path, pair: Pair, lobes: tuple[Path | None, Path | None], report: Report) -> str:
    """Measure and write at the end of a registration (``--also function``); returns the section for report.html.

    InputError as in `function`; findings that the user should check become warnings of the registration.
    """
    check_function(folder)
    settings = DEFAULT
    regions = [regions_of(of.lungs, path) for of, path in zip((pair.fixed, pair.moving), lobes, strict=True)]
    case = Case(pair.fixed, pair.moving, pair.transform, regions[0], regions[1], _error_on(pair.expected))
    found = measured(case, settings)
    for sentence in found.warnings:
        report.warn(sentence)
    names = {"fixed": pair.fixed.image.path.name, "moving": pair.moving.image.path.name}
    return write_function(folder, found, settings, names)


def write_function(folder: Path, found: Measured, settings: FunctionSettings, names: dict[str, str]) -> str:
    """Write table and images; returns the section for report.html. The JSON file is written last: its presence means
    that all files are complete."""
    (folder / FUNCTION[0]).unlink(missing_ok=True)
    images = folder / "images" / FUNCTION_IMAGES
    images.mkdir(parents=True, exist_ok=True)
    for name, values in measures(found, settings.tissue_hu).items():
        path = images / f"{name}.mha"
        dtype = torch.uint8 if values.dtype == np.uint8 else torch.float32
        write_image_slabs(path, found.voxels.grid, _scattered(found, values), dtype, result_mark(path))
    write_text(images / FUNCTION_COLOURS, f"{FUNCTION_MARK}\n{colour_table()}")
    write_text(folder / FUNCTION[1], as_csv(found))
    content = {
        "version": __version__,
        "inspiration": found.inspiration,
        **names,
        "settings": asdict(settings),
        "warnings": list(found.warnings),
        "regions": found.regions,
    }
    write_results(folder / FUNCTION[0], content)
    return section(found)


def measures(found: Measured, tissue_hu: float) -> dict[str, Float32[np.ndarray, " n"] | UInt8[np.ndarray, " n"]]:
    """The values of the images by name. They use the filtered HU, and `NOTHING` where a voxel does not count."""
    voxels, counts = found.voxels, (found.prm != UNCERTAIN) & (found.prm != LEFT_OUT)
    inside, outside = (
        tissue_share(hu, tissue_hu) for hu in (scaled(voxels.inspiration_hu, found.mass_factor), voxels.expiration_hu)
    )
    stretches = voxels.stretches
    values = {
        "saj": np.where(found.prm != UNCERTAIN, saj(voxels.expansion), NOTHING),
        "sacj": np.where(counts, sacj(voxels.expansion, inside, outside), NOTHING),
        "sai": np.where(counts, sai(inside, outside), NOTHING),
        "adi": np.where(found.prm != UNCERTAIN, anisotropic_deformation_index(stretches), NOTHING),
        "sri": np.where(found.prm != UNCERTAIN, slab_rod_index(stretches), NOTHING),
    }
    numbers = {
        name: np.nan_to_num(of, nan=NOTHING, posinf=HIGHEST).clip(NOTHING, HIGHEST).astype(np.float32)
        for name, of in values.items()
    }
    return {"prm": found.prm, **numbers}


def _scattered(found: Measured, values: np.ndarray) -> Iterator[Tensor]:
    """The values at their positions in the box, slab by slab. Outside the lungs labels are 0 and numbers `NOTHING`."""
    where, start, z = found.voxels.where, 0, 0
    for slab in slabs(found.voxels.grid):
        inside = where[z : z + slab.shape[0]]
        count = int(inside.sum())
        part = np.full(slab.shape, 0 if values.dtype == np.uint8 else NOTHING, values.dtype)
        part[inside] = values[start : start + count]
        start, z = start + count, z + slab.shape[0]
        yield torch.from_numpy(part)[None, None]


def as_csv(found: Measured) -> str:
    """CSV text with one line per region; unknown values are empty."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["region", *(quantity.key for quantity in QUANTITIES)])
    for region, row in found.regions.items():
        cells = (row[quantity.key] for quantity in QUANTITIES)
        writer.writerow([region, *("" if value is None else f"{value:.6g}" for value in cells)])
    return out.getvalue()


def in_words(folder: Path, found: Measured, names: dict[str, str]) -> str:
    """The most important figures in sentences."""
    row, expiration = lungs_row(found), "moving" if found.inspiration == "fixed" else "fixed"
    known = {quantity.key: quantity.text(row[quantity.key]) for quantity in QUANTITIES}
    return (
        f"Inspiration: the {found.inspiration} scan ({names[found.inspiration]}), {known['volume_in_l']} l; "
        f"expiration: the {expiration} scan ({names[expiration]}), {known['volume_ex_l']} l.\n"
        f"PRM: {known['prm_normal_percent']} % normal, {known['prm_fsad_percent']} % fSAD, "
        f"{known['prm_emphysema_percent']} % emphysema, {known['prm_emptying_percent']} % in the fourth quadrant. "
        f"SAJ {known['saj']}, SACJ {known['sacj']}, SAI {known['sai']}.\n"
        f"Table: {folder / FUNCTION[1]}; images: {folder / 'images' / FUNCTION_IMAGES}."
    )
