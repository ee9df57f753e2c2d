"""From two scans to one displacement field.

prepare    affine map between the lungs; box around the fixed lungs, resized to the network grid (192×160×192)
cascade    displacement field on the network grid
refine     minimisation of the objective for this pair, from the cascade's field
unfold     local repair where the field folds
quality    figures that say whether to trust it
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

import torch

from algorithm.compiled import compiled, pays
from algorithm.errors import InputError, out_of_memory
from algorithm.extension import extended
from algorithm.folding import unfold
from algorithm.geometry import resample
from algorithm.network import Cascade, fastest_precision
from algorithm.prepare import Prepared, Subject, prepare
from algorithm.quality import quality, warnings
from algorithm.refine import FAST, FULL, Refined, refine
from algorithm.report import Report
from algorithm.transform import Transform

T = TypeVar("T")

REFINE = {"fast": FAST, "full": FULL}
"""By the names of ``--refine``."""
MOST_REPAIRED = 0.01
"""A share of the field's voxels; more repair than that is reported as a warning."""


def choose_device(option: str, report: Report) -> torch.device:
    """The device for ``--device``; auto without a GPU is the CPU, with a warning."""
    if option == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that this PyTorch can use, expected one (or --device cpu)")
    if option == "auto" and not torch.cuda.is_available():
        report.warn("No GPU: running on the CPU.")
        return torch.device("cpu")
    return torch.device("cuda" if option == "auto" else option)


def register(
    fixed: Subject, moving: Subject, cascade: Cascade, refinement: str, device: torch.device, report: Report
) -> Transform:
    """Registers two scans; ``refinement`` is off, fast or full. Says in ``report`` how well it went."""
    with report.timed("prepare"):
        pair = prepare(fixed, moving, cascade.settings.network_size)
    with report.timed("cascade"):
        found = on_device("The cascade", lambda where: predict(pair, cascade, where, report), device, report)
    result = found
    if refinement != "off":
        settings = REFINE[refinement]
        with report.timed("refine"):
            result = on_device(
                "The refinement",
                lambda where: refine(fixed, moving, pair.affine, found.displacement.to(where), found.grid, settings),
                device,
                report,
            )
    return finish(pair, moving, result, report)


def on_device(stage: str, function: Callable[[torch.device], T], device: torch.device, report: Report) -> T:
    """``function(device)``; again on the CPU, with a warning, where the GPU's memory does not suffice."""
    try:
        return function(device)
    except RuntimeError as error:
        if device.type == "cpu" or not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    # only here is nothing left of what the first attempt held: its traceback did
    torch.cuda.empty_cache()
    report.warn(f"{stage} was repeated on the CPU, for lack of memory on the GPU ({reason}).")
    return function(torch.device("cpu"))


@torch.no_grad()
def predict(pair: Prepared, cascade: Cascade, device: torch.device, report: Report) -> Refined:
    """The cascade's field, continued around the lungs; in single precision where half precision overflows."""
    there = pair.to(device)
    images = there.fixed, there.grid, there.moving, there.moving_grid
    displacement, grid = fastest(cascade, device, fastest_precision(device))(*images)
    if not displacement.isfinite().all():
        report.warn("The cascade overflowed in half precision: repeated in single precision.")
        displacement, grid = fastest(cascade, device, torch.float32)(*images)
    return Refined(extended(displacement.float(), there.fixed_lungs).cpu(), grid, None)


def fastest(cascade: Cascade, device: torch.device, precision: torch.dtype) -> Cascade:
    """The cascade as it runs fastest on a device in that precision."""
    if device.type == "cpu" and pays():
        return compiled(cascade, precision)
    cascade = cascade.to(device)
    cascade.precision = precision
    return cascade


@torch.no_grad()
def finish(pair: Prepared, moving: Subject, result: Refined, report: Report) -> Transform:
    """Repairs the field where it folds, and says in ``report`` what became of it."""
    with report.timed("unfold"):
        displacement, repaired = unfold(result.displacement.cpu(), result.grid)
    if repaired > MOST_REPAIRED * displacement[0, 0].numel():
        report.warn(f"The field folded and was smoothed at {repaired} of {displacement[0, 0].numel()} voxels.")
    with report.timed("quality"):
        figures = quality(pair, displacement, result.grid, moving.image.grid)
        figures["after"] |= inconsistency(pair, result)
    for sentence in warnings(figures):
        report.warn(sentence)
    report.set(quality=figures, repaired_voxels=repaired, prealignment=asdict(pair.affine))
    return Transform(displacement, result.grid, pair.affine)


def inconsistency(pair: Prepared, result: Refined) -> dict[str, float]:
    """Mean and 95th percentile (mm) in the lungs of the distance between both directions, where both were done."""
    if result.inconsistency_mm is None:
        return {}
    lungs = resample(pair.fixed_lungs, pair.grid, result.grid) > 0.5
    values = result.inconsistency_mm.cpu()[lungs]
    if not len(values):  # lungs thinner than the voxels of the field
        return {}
    return {"inconsistency_mm": float(values.mean()), "inconsistency_p95_mm": float(values.quantile(0.95))}
