"""Runs the main program in this process, and reads what it wrote the way any user would: with SimpleITK."""

import functools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm import command
from algorithm.__main__ import main
from algorithm.preparation.prepare import PrepareSettings, prepare
from algorithm.preparation.scan import PrealignSettings
from algorithm.registration import REFINE
from tests.support.golden_check import landmark_errors_mm, read_only_image
from tests.support.made_up_cases import read_strictly
from tests.support.remembered import remembered

COARSE = PrepareSettings(prealign_spacing_mm=8.0, prealign=PrealignSettings(iterations=10, deformed=(30, 20)))
"""Close to the default on phantoms, in a tenth of its time."""
REMEMBERED = (
    "algorithm.lungs.mask._lungs",
    "algorithm.preparation.prepare.prealign",
    "algorithm.fields.inverse.inverse_and_residual",
    "algorithm.deliver.inverse_and_residual",
)

HANGS_HALF_WAY = """
import sys, time
from algorithm.fields.transform import Transform
from tests.support.running import call_main
whole = Transform.{method}
def half(self, *arguments):
    slab = next(whole(self, *arguments))
    yield slab[:, :, : slab.shape[2] // 2].contiguous()
    print("half-way", flush=True)
    time.sleep(600)
Transform.{method} = half
sys.exit(call_main(*sys.argv[1:]))
"""
"""A program: the main one, but that writing what `Transform.{method}` yields never gets beyond a part of it."""


@contextmanager
def coarsely(module: str) -> Iterator[None]:
    """In the body, ``module`` prepares pairs with `COARSE`, and what is known of earlier ones is not worked out again.

    Most tests register the same scans, and ask how they are read or what is written: then the lungs of the same voxels,
    the pre-alignment of the same two, and the inverse of the same field, are known.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.prepare", functools.partial(prepare, settings=COARSE))
        for place in REMEMBERED:
            patch.setattr(place, remembered(pkgutil.resolve_name(place)))
        yield


def call_main(*arguments: object) -> int:
    """The exit code of ``python -m algorithm ARGUMENTS``, with a pre-alignment that is fast but coarse.

    Without refinement unless the arguments ask for it, and then a coarse one; without a page unless they ask for it.
    """
    for option, value in (("--refine", "off"), ("--report", "off")):
        if not any(str(argument).startswith(option) for argument in arguments):
            arguments = (*arguments, f"{option}={value}")
    with pytest.MonkeyPatch.context() as patch, coarsely("algorithm.registration"):
        for name, settings in list(REFINE.items()):
            patch.setitem(REFINE, name, replace(settings, spacing_mm=(16.0, 8.0), steps=(15, 15)))
        return exit_code(main, "algorithm", *arguments)


def lungreg(*arguments: object) -> int:
    """The exit code of ``lungreg ARGUMENTS``."""
    return exit_code(command.main, "lungreg", *arguments)


def exit_code(program: Callable[[], int], *arguments: object) -> int:
    """What the program returns, or exits with, when it is called by these arguments, its name the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, arguments)])
        try:
            return program()
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code


def pair_options(example: Path, output: Path, weights: Path) -> list[str]:
    """The options for the pair in a folder as `phantom` writes it, on the CPU."""
    files = [f"--fixed={example / 'fixed.mha'}", f"--moving={example / 'moving.mha'}"]
    return [*files, f"--output={output}", f"--weights={weights}", "--device=cpu"]


def files_below(folder: Path) -> set[str]:
    """All files, hidden ones too, relative to the folder; none when there is no folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def field_image(output: Path) -> sitk.Image:
    """The one displacement field."""
    return read_only_image(output / "images" / "displacement-field")


def field_array(output: Path) -> np.ndarray:
    """The displacements (z, y, x, 3) in mm; the 4-D layout brought into this order."""
    image = field_image(output)
    array: np.ndarray = sitk.GetArrayFromImage(image)
    return np.moveaxis(array, 0, -1) if image.GetDimension() == 4 else array


def warped_image(output: Path) -> sitk.Image:
    """The one warped image."""
    return read_only_image(output / "images" / "warped-moving")


def results(output: Path) -> dict[str, Any]:
    """results.json, read by the letter."""
    return read_strictly(output / "results.json")


def prealignment_errors_mm(output: Path, example: Path) -> tuple[float, float]:
    """Mean landmark error of the identity, and of the affine pre-alignment in results.json."""
    affine = results(output)["prealignment"]
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.ravel(affine["matrix"]).tolist())
    transform.SetTranslation(affine["offset"])
    before, after = (
        float(landmark_errors_mm(t, example).mean()) for t in (sitk.Transform(3, sitk.sitkIdentity), transform)
    )
    return before, after
