"""Write a phantom pair with its exact motion: ``python -m phantom OUT [--inputs FORM...] [--masks]``.

OUT gets fixed.mha and moving.mha (HU, int16), fixed_lobes.mha and moving_lobes.mha (uint8), displacement_field.mha (mm,
LPS, on the fixed grid), fixed_landmarks.csv and moving_landmarks.csv (header x,y,z; mm, LPS; the same row is the same
point). For each FORM of `phantom.forms`, inputs/FORM/ is the pair as an /input folder, with lung masks after --masks.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.errors import InputError
from algorithm.files.writing import write_field, write_image
from phantom.forms import FORMS, write_input
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair
from phantom.shapes import Lungs

DEFAULT = PhantomSettings()
NUMBERS = ("diaphragm_mm", "chest_ap_mm", "chest_lateral_mm", "ribs_mm", "detail_mm", "inhale_hu", "noise_hu")
log = logging.getLogger("phantom")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0 when the pair is written, 2 after bad arguments, with one sentence on stderr."""
    options = vars(_parser().parse_args(arguments))
    out, size, moving_size = options.pop("out"), options.pop("size"), options.pop("moving_size")
    forms, masks = options.pop("inputs"), options.pop("masks")
    try:
        fixed_grid, moving_grid = chest_grid(tuple(size)), chest_grid(tuple(moving_size or size))
        write_pair(out, make_pair(PhantomSettings(fixed_grid=fixed_grid, moving_grid=moving_grid, **options)))
        for form in forms:
            write_input(out / "inputs" / form, form, input_files(out, masks))
    except (InputError, OSError) as error:
        log.error("%s", error)
        return 2
    return 0


def write_pair(out: Path, pair: PhantomPair) -> None:
    """Write the files of a pair into the folder ``out``, which is created if it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    write_image(out / "fixed.mha", _int16(pair.fixed), pair.fixed_grid)
    write_image(out / "moving.mha", _int16(pair.moving), pair.moving_grid)
    write_image(out / "fixed_lobes.mha", pair.fixed_lobes, pair.fixed_grid)
    write_image(out / "moving_lobes.mha", pair.moving_lobes, pair.moving_grid)
    write_field(out / "displacement_field.mha", pair.fixed_grid, [pair.displacement_mm], layout="itk")
    _write_points(out / "fixed_landmarks.csv", pair.fixed_landmarks_mm)
    _write_points(out / "moving_landmarks.csv", pair.moving_landmarks_mm)
    log.info("%d landmarks in %s", len(pair.fixed_landmarks_mm), out)


def input_files(out: Path, masks: bool) -> dict[str, Path]:
    """The written images by their roles in /input. The lobes serve as lung masks: every label except 0 is lung."""
    files = {"fixed": out / "fixed.mha", "moving": out / "moving.mha"}
    return files | ({"fixed-mask": out / "fixed_lobes.mha", "moving-mask": out / "moving_lobes.mha"} if masks else {})


def _write_points(path: Path, points_mm: Float[np.ndarray, "n 3"]) -> None:
    pd.DataFrame(points_mm, columns=["x", "y", "z"]).to_csv(path, index=False, float_format="%.4f")


def _int16(hu: Tensor) -> Tensor:
    return hu.round().clamp(-32768, 32767).to(torch.int16)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("phantom", description="A lung CT phantom pair with known motion.")
    parser.add_argument("out", type=Path, metavar="OUT")
    for name, size, image in (("--size", DEFAULT.fixed_grid.size, "fixed"), ("--moving-size", None, "moving")):
        text = f"voxels over the chest, {image} image (default: {size or 'as --size'})"
        parser.add_argument(name, type=int, nargs=3, metavar=("X", "Y", "Z"), default=size, help=text)
    parser.add_argument("--inputs", choices=FORMS, nargs="+", default=[], help="the pair as /input folders, too")
    parser.add_argument("--masks", action="store_true", help="with lung masks")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed)
    parser.add_argument("--landmarks", type=int, default=DEFAULT.landmarks, help="at most so many")
    parser.add_argument("--fixed-phase", choices=("inhale", "exhale"), default=DEFAULT.fixed_phase)
    parser.add_argument("--lungs", choices=get_args(Lungs), default=DEFAULT.lungs)
    parser.add_argument("--opacity-mm", type=float, default=DEFAULT.opacity_mm, help="depth of fluid in a lung base")
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=DEFAULT.table)
    parser.add_argument("--outside-hu", type=float, default=None, help="padding outside the circular field of view")
    for name in NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(DEFAULT, name))
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
