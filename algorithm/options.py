"""The options of a registration, defined once for all command lines, and the container's command line, made from
`Options`."""

import argparse
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from . import __version__
from .errors import InputError
from .files.inputs import PLATFORM_FILE, Inputs
from .serve import HOST, PORT

Device = Literal["auto", "cuda", "cpu"]
Refine = Literal["off", "fast", "full"]
FieldLayout = Literal["auto", "itk", "grand-challenge"]
FieldGrid = Literal["fixed", "network"]
"""The grid of the written field: that of the fixed image, or the one on which it was computed (the network's, or after
the refinement the grid of its last control points).

Inside the outermost voxel centres of the smaller grid, both are the same field, because the affine part is linear:
trilinear interpolation of one gives the other up to rounding. The smaller grid ends some millimetres outside the fixed
lungs. Beyond it, the field on the fixed grid holds the border values of u with the affine map. Programs that read the
smaller field assume zero displacement there.
"""
Switch = Literal["on", "off"]
Names = Literal["case", "kind"]
Format = Literal["auto", "mha", "nii.gz", "nrrd"]
Page = Literal["auto", "on", "off"]
Also = Literal["nothing", "function"]

HELP = {
    "input": "folder with inputs.json, with images/fixed and images/moving, or with fixed.* and moving.*",
    "output": "folder for the results",
    "fixed": "the fixed image, a file or the folder of a DICOM series; replaces --input and needs --moving",
    "moving": "the moving image, a file or the folder of a DICOM series; needs --fixed",
    "fixed_mask": "lung mask of the fixed image, on any grid; without it, the mask is made from the HU",
    "moving_mask": "lung mask of the moving image; without it, the mask is made from the HU",
    "fixed_lobes": "lobes of the fixed image, instead of a mask: TotalSegmentator's file with all labels or its "
    "folder, or lungmask's file",
    "moving_lobes": "lobes of the moving image, in the same formats",
    "weights": "folder with a manifest.json, or a .safetensors file beside a manifest.json (default: bundled weights)",
    "device": "auto: the GPU if there is one, else the CPU",
    "refine": "minimise the objective for this pair after the cascade: off; fast, some seconds; full, thorough",
    "field_layout": "itk: 3-D vectors; grand-challenge: 4-D scalars; auto: chosen by the source of the input",
    "field_grid": "grid of the written field. fixed: that of the fixed image; network: the coarser one on which it is "
    "computed, only around the fixed lungs",
    "format": "format of the field, the warped image and the expected error. auto: that of the fixed image if it is "
    "one of these; otherwise, and on grand-challenge.org, mha",
    "names": "names of the written images. case: as the fixed image; kind: with _field, _warped or _error added",
    "transforms": "also write transform.h5 (fixed to moving points) and inverse.h5, for ITK, ANTs and 3D Slicer",
    "also": "function: also measure ventilation, air trapping, densities and strains, see lungreg function",
    "report": "write report.html, a page with pictures. auto: not on grand-challenge.org, which would drop it",
}


@dataclass(frozen=True)
class Options:
    """The options of the command line; every field is an option of that name."""

    input: Path = Path("/input")
    output: Path = Path("/output")
    fixed: Path | None = None
    moving: Path | None = None
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_lobes: Path | None = None
    moving_lobes: Path | None = None
    weights: Path | None = None
    device: Device = "auto"
    refine: Refine = "full"
    field_layout: FieldLayout = "auto"
    field_grid: FieldGrid = "fixed"
    format: Format = "mha"
    names: Names = "case"
    transforms: Switch = "off"
    report: Page = "auto"
    also: Also = "nothing"

    def on_platform(self) -> bool:
        """Whether grand-challenge.org's inputs.json names the files of the case."""
        with suppress(OSError):  # `inputs` reports the error
            return self.fixed is None and self.moving is None and (self.input / PLATFORM_FILE).exists()
        return False

    def wants_page(self) -> bool:
        """Whether report.html is written. The platform collects only the files of its sockets, so it would lose the
        page."""
        return self.report == "on" or (self.report == "auto" and not self.on_platform())

    def steps(self) -> list[str]:
        """The steps of a run, by the names of the timings."""
        refinement = "second opinion" if self.refine == "off" else "refine"
        page = ["write page"] if self.wants_page() else []
        transforms = ["write transforms"] if self.transforms == "on" else []
        also = [] if self.also == "nothing" else [self.also]
        return [
            *("read", "lungs", "prepare", "cascade", refinement, "unfold", "quality", "expected error"),
            *("write field", "write warped", "write expected error", *transforms, *also, *page),
        ]

    def sources(self) -> list[Path]:
        """All paths that may hold input."""
        given = (self.input, self.fixed, self.moving, self.fixed_mask, self.moving_mask, *self.lobes())
        return [path for path in given if path is not None]

    def lobes(self) -> list[Path]:
        """The lobe files that are given."""
        return [path for path in (self.fixed_lobes, self.moving_lobes) if path is not None]

    def inputs(self) -> Inputs:
        """The files of the case; InputError if the options do not determine them."""
        if self.fixed is None and self.moving is None:
            if self.fixed_mask or self.moving_mask or self.lobes():
                raise InputError("--fixed-mask and --moving-mask, or lobes, need --fixed and --moving")
            from .files.folders import find_inputs  # here: it imports torch, which --help does not need

            return find_inputs(self.input)
        if self.fixed is None or self.moving is None:
            raise InputError(f"--{'moving' if self.fixed else 'fixed'} is missing: --fixed and --moving go together")
        if (self.fixed_mask and self.fixed_lobes) or (self.moving_mask and self.moving_lobes):
            raise InputError("a mask and lobes are given for one image, expected one of them")
        return Inputs(self.fixed, self.moving, self.fixed_mask, self.moving_mask)


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line; an error exits with code 2 and one sentence."""
    parser = _parser(
        "python -m algorithm",
        "Registers a moving to a fixed CT scan of the lungs; writes the displacement field.",
        "`python -m algorithm serve` does so on request, case by case: grand-challenge.org's invoke method.",
    )
    return Options(**vars(parser.parse_args(arguments)))


def parse_serve(arguments: list[str], program: str = "python -m algorithm serve") -> tuple[Options, int, str]:
    """As `parse`, for the arguments after ``serve``; also the port and the address of the interface to listen on."""
    parser = _parser(
        program,
        "A server that registers --input into --output at each POST /invoke; GET /health says when it is ready.",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT})")
    parser.add_argument("--host", default=HOST, help=f"0.0.0.0 listens on all interfaces (default: {HOST})")
    values = vars(parser.parse_args(arguments))
    port, host = values.pop("port"), values.pop("host")
    return Options(**values), port, host


def _parser(program: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for the fields of `Options`."""
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    for entry in fields(Options):
        choices = get_args(entry.type) if get_origin(entry.type) is Literal else None
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=str if choices else Path,
            choices=choices,
            default=entry.default,
            help=HELP[entry.name] + (f" (default: {entry.default})" if entry.default else ""),
        )
    return parser
