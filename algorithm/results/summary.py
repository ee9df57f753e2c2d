"""The figures of a run, and sentences about it, for results.json, the log and the page."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..fields.transform import Transform
from ..geometry import lengths, resample
from ..preparation.subject import Subject
from ..report import of_the_result
from .outputs import Outputs

ERROR_MM = 3.0
"""Voxels with a larger expected error are counted."""


@torch.no_grad()
def figures(fixed: Subject, moving: Subject, transform: Transform) -> dict[str, Any]:
    """Entries of results.json: the lung volumes, and the displacement in the fixed lungs."""
    litres = {"fixed": fixed.lungs.litres, "moving": moving.lungs.litres}
    return {"lungs_litres": litres, "motion_mm": motion(fixed, transform)}


def motion(fixed: Subject, transform: Transform) -> dict[str, float]:
    """Mean, 95th percentile and maximum (mm) of the displacement's length in the fixed lungs; empty for thin ones."""
    grid = transform.grid
    lungs = resample(fixed.lungs.mask.float(), fixed.lungs.grid, grid, fill=0.0)[0, 0] > 0.5
    moved: Float[Tensor, " n"] = lengths(transform.field(grid))[0, 0][lungs]
    if not len(moved):
        return {}
    p95 = moved.kthvalue(max(1, round(0.95 * len(moved)))).values  # `quantile` takes 16 million values at most
    return {"mean": float(moved.mean()), "p95": float(p95), "max": float(moved.max())}


def in_words(results: dict[str, Any], outputs: Outputs) -> list[str]:
    """The most important figures of a finished run, line by line. ``results`` is the content of results.json."""
    seconds, warnings = results["timings_s"]["total"], len(of_the_result(results["warnings"]))
    fixed, moving = (results.get(role, f"the {role} scan") for role in ("fixed", "moving"))
    lines = [f"Done: {moving} is registered to {fixed}, in {seconds:.0f} s."]
    facts = {
        "Lungs": lungs_in_words(results),
        "Motion": motion_in_words(results),
        "Expected error": error_in_words(results),
        "Foldings": foldings_in_words(results),
        "Warnings": f"{warnings}, see above" if warnings else "none",
        "Field": str(outputs.displacement_field),
        "Warped scan": str(outputs.warped_moving),
        "Figures": str(outputs.results),
        "Page to look at": str(outputs.page) if outputs.page else "",
    }
    return lines + [f"  {name + ':':<16} {text}" for name, text in facts.items() if text]


def lungs_in_words(results: dict[str, Any]) -> str:
    """The lung volumes; empty if they are not known."""
    litres = results.get("lungs_litres")
    if not litres:
        return ""
    change = 100 * (litres["moving"] / litres["fixed"] - 1)
    less = "less" if change < 0 else "more"
    return f"{litres['fixed']:.2f} l fixed, {litres['moving']:.2f} l moving ({abs(change):.0f} % {less})"


def motion_in_words(results: dict[str, Any]) -> str:
    """The motion of the lungs; empty if it is not known."""
    of = results.get("motion_mm")
    return f"{of['mean']:.1f} mm in the mean over the fixed lungs, {of['max']:.1f} mm at most" if of else ""


def error_in_words(results: dict[str, Any]) -> str:
    """The mean expected error, and where it is large; empty without an expected error."""
    of = results.get("expected_error")
    if not of or of.get("mean_mm") is None:
        return ""
    words = f"{of['mean_mm']:.1f} mm in the mean"
    if of.get("p95_mm") is not None:
        words += f", 95 % of the lungs within {of['p95_mm']:.1f} mm"
    if of.get("share_above_3mm") is not None:
        words += f", {100 * of['share_above_3mm']:.1f} % of them beyond {ERROR_MM:.0f} mm"
    return words


def foldings_in_words(results: dict[str, Any]) -> str:
    """The number of voxels where the written field folds."""
    of = results.get("jacobian")
    if not of:
        return ""
    folded, voxels = of["folded_voxels"], f"{of['voxels']:,} voxels of the field".replace(",", " ")
    return f"at {folded} of {voxels}" if folded else f"none, at {voxels}"
