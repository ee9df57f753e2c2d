"""From two scans to one displacement field.

prepare    affine map between the lungs; box around the fixed lungs, resized to the network grid (192×160×192)
cascade    displacement field on the network grid
refine     minimisation of the objective for this pair, from the cascade's field
unfold     local repair where the field folds
quality    figures that show whether to trust the field, and the expected error
"""

import copy
import logging
import math
from dataclasses import asdict
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .cascade.compiled import compile_ahead, compiled, pays, release
from .cascade.extension import extended
from .cascade.network import Cascade, fastest_precision
from .cascade.weights import LoadedCascade
from .devices import on_device
from .fields.expected_error import ErrorModel, ExpectedError, expected_error, features
from .fields.expected_error import warnings as error_warnings
from .fields.folding import unfold
from .fields.quality import quality, warnings
from .fields.transform import Transform
from .geometry import Grid, downsample, has_loop, jacobian_determinant, lengths, resample, validity
from .preparation.prepare import Prepared, prepare
from .preparation.subject import Subject
from .refinement.refine import FAST, FULL, Refined, RefineSettings, farther, refine
from .report import Report
from .threads import Pool

log = logging.getLogger(__name__)

REFINE = {"fast": FAST, "full": FULL}
"""Settings by the names of ``--refine``."""

MOST_REPAIRED = 0.01
"""If a larger share of the field's voxels is repaired, there is a warning."""


class Registered(NamedTuple):
    """The result of `register`."""

    transform: Transform
    expected: ExpectedError | None
    """None if the weights have no error model."""


def register(
    fixed: Subject,
    moving: Subject,
    weights: LoadedCascade,
    refinement: str,
    device: torch.device,
    report: Report,
    insist: bool = False,
) -> Registered:
    """Register two scans; ``refinement`` is off, fast or full. ``report`` gets the quality figures and warnings.

    If the GPU cannot be used, the CPU replaces it, with a warning, unless the user ``insist``s on the device.
    """
    with Pool(1) as pool:  # most of the preparation uses one thread
        ready = pool.submit(get_ready, weights.cascade, device)
        with report.timed("prepare"):
            pair = prepare(fixed, moving, weights.cascade.settings.network_size)
        ready.result()
    with report.timed("cascade"):
        found = on_device(
            "The cascade", lambda where: predict(pair, weights.cascade, where, report), device, report, insist
        )
    model = None if weights.errors is None else weights.errors.of(refinement)
    result = found
    if refinement != "off":
        with report.timed("refine"):
            result = on_device(
                "The refinement",
                lambda where: refined(fixed, moving, pair, found, REFINE[refinement], model, where),
                device,
                report,
                insist,
            )
    elif model is not None:
        with report.timed("second opinion"):
            result = on_device(
                "The second opinion", lambda where: doubted(fixed, moving, pair, found, where), device, report, insist
            )
    transform = checked_transform(pair, fixed, moving, result, report)
    if model is None:
        return Registered(transform, None)
    with report.timed("expected error"):
        return Registered(transform, estimate(pair, moving, result, model, report))


def refined(
    fixed: Subject,
    moving: Subject,
    pair: Prepared,
    found: Refined,
    settings: RefineSettings,
    model: ErrorModel | None,
    device: torch.device,
) -> Refined:
    """The refinement from the cascade's field.

    If its expected error is large, the refinement is repeated with one coarser level (`farther`), and the result with
    the smaller expected error is returned. The coarser level is not always used: where the cascade is right, larger
    steps on coarser images can lose its result (copd_like covidctmd_normal001_109: 0.48 mm, with a level of 8 mm 0.66).
    """

    def result(settings: RefineSettings) -> Refined:
        return refine(fixed, moving, pair.affine, found.displacement.to(device), found.grid, settings)

    first = result(settings)
    if model is None or not error_warnings(error_of(pair, moving, first, model).figures()):
        return first
    log.info("refined again, with more reach")
    both = first, result(farther(settings))
    return min(both, key=lambda one: error_of(pair, moving, one, model).figures()["mean_mm"] or 0.0)


def doubted(fixed: Subject, moving: Subject, pair: Prepared, found: Refined, device: torch.device) -> Refined:
    """The cascade's field, unchanged, with its distance (mm) from what ``--refine fast`` makes of it."""
    other = refine(fixed, moving, pair.affine, found.displacement.to(device), found.grid, FAST)
    apart = lengths(found.displacement - resample(other.displacement.cpu(), other.grid, found.grid))
    return found._replace(inconsistency_mm=apart)


@torch.no_grad()
def predict(pair: Prepared, cascade: Cascade, device: torch.device, report: Report) -> Refined:
    """The cascade's field, continued around the lungs; in single precision if half precision overflows."""
    there = pair.to(device)
    images = there.fixed, there.grid, there.moving, there.moving_grid
    networks = fastest(cascade, device, fastest_precision(device))
    displacement, grid = networks(*images)
    if not math.isfinite(displacement.sum(dtype=torch.float64)):
        report.warn("The cascade overflowed in half precision: repeated in single precision.")
        networks = fastest(cascade, device, torch.float32)
        displacement, grid = networks(*images)
    with Pool(1) as pool:  # freeing the memory takes time, too
        released = pool.submit(release, networks)
        continued = extended(displacement.float(), there.fixed_lungs).cpu()
        released.result()  # a fault of it is not lost
    return Refined(continued, grid, None)


class Evidence(NamedTuple):
    """What the expected error is computed from, on the network grid at half its resolution."""

    features: Float[Tensor, "2 z y x"]
    known: Float[Tensor, "1 1 z y x"]
    """1 in the lungs that the moving image shows, else 0."""
    grid: Grid


@torch.no_grad()
def evidence(pair: Prepared, moving: Subject, result: Refined) -> Evidence:
    """ValueError if there is no second field."""
    if result.inconsistency_mm is None:
        raise ValueError("the expected error needs a second field")
    grid = pair.grid.coarsened()
    apart, displacement = (resample(v.cpu(), result.grid, grid) for v in (result.inconsistency_mm, result.displacement))
    seen = validity(displacement, grid, moving.image.grid, affine=pair.affine)
    known = ((downsample(pair.fixed_lungs) > 0.5) & seen).float()
    volume = pair.affine.determinant * jacobian_determinant(displacement, grid)[None]
    return Evidence(features(apart, volume, known), known, grid)


def error_of(pair: Prepared, moving: Subject, result: Refined, model: ErrorModel) -> ExpectedError:
    """The expected error of a result. ValueError if there is no second field."""
    found = evidence(pair, moving, result)
    return expected_error(found.features, found.known, found.grid, model)


def estimate(
    pair: Prepared, moving: Subject, result: Refined, model: ErrorModel, report: Report
) -> ExpectedError | None:
    """`error_of`, with its figures and warnings in ``report``. None if there is no second field."""
    if result.inconsistency_mm is None:
        return None
    expected = error_of(pair, moving, result, model)
    figures = expected.figures()
    for sentence in error_warnings(figures):
        report.warn(sentence)
    report.set(expected_error=figures)
    return expected


def get_ready(cascade: Cascade, device: torch.device) -> None:
    """Compile the loops and networks that `predict` uses."""
    if device.type == "cpu":
        has_loop()
    if device.type == "cpu" and pays():
        compile_ahead(cascade, fastest_precision(device))


def fastest(cascade: Cascade, device: torch.device, precision: torch.dtype) -> Cascade:
    """The fastest form of the cascade for this device and precision."""
    if device.type == "cpu" and pays():
        return compiled(cascade, precision)
    if device.type != "cpu":  # a copy: if the GPU fails, its weights cannot be read back
        cascade = copy.deepcopy(cascade).to(device)
    cascade.precision = precision
    return cascade


@torch.no_grad()
def checked_transform(pair: Prepared, fixed: Subject, moving: Subject, result: Refined, report: Report) -> Transform:
    """Repair the field where it folds, and put its quality figures and warnings into ``report``."""
    with report.timed("unfold"):
        displacement, repaired = unfold(result.displacement.cpu(), result.grid)
    if repaired > MOST_REPAIRED * displacement[0, 0].numel():
        report.warn(f"The field folded and was smoothed at {repaired} of {displacement[0, 0].numel()} voxels.")
    with report.timed("quality"):
        figures = quality(pair, displacement, result.grid, fixed.image.grid, moving.image.grid)
        figures["after"] |= inconsistency(pair, result)
    for sentence in warnings(figures):
        report.warn(sentence)
    report.set(quality=figures, repaired_voxels=repaired, prealignment=asdict(pair.affine))
    return Transform(displacement, result.grid, pair.affine)


def inconsistency(pair: Prepared, result: Refined) -> dict[str, float]:
    """Mean and 95th percentile (mm) in the lungs of the distance between both fields; empty if there is only one."""
    if result.inconsistency_mm is None:
        return {}
    lungs = resample(pair.fixed_lungs, pair.grid, result.grid) > 0.5
    values = result.inconsistency_mm.cpu()[lungs]
    if not len(values):  # the lungs are thinner than the voxels of the field
        return {}
    return {"inconsistency_mm": float(values.mean()), "inconsistency_p95_mm": float(values.quantile(0.95))}
