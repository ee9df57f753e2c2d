"""Converts a displacement field between formats: ``python -m evaluation.convert FIELD OUT``.

FIELD and OUT are files, or EMPIRE10 folders; their names determine the format (see `fields.py`). FIELD may also be the
result folder of a registration. OUT is in Learn2Reg's format for disp_*.nii.gz and *.npz, an EMPIRE10 folder for a name
without an ending, ITK's transform for *.h5, *.hdf5 and *.tfm, a parameter file for transformix for *.txt, and otherwise
ITK's image, which ANTs reads as a warp. ``--to`` selects another format.
"""

import argparse
import sys
from pathlib import Path

import SimpleITK as sitk

from .errors import InputError, exit_code, printable
from .exchange import write_nifti_vectors, write_transformix
from .fields import (
    TRANSFORMS,
    is_learn2reg,
    is_transform,
    read_field,
    write_empire10,
    write_grand_challenge,
    write_itk,
    write_learn2reg,
    write_transform,
)
from .images import ENDINGS, Grid, read_grid
from .results import is_result, result_field, transform_of
from .tables import all_or_nothing, prepare_file, prepare_folder

FORMATS = ("itk", "grand-challenge", "learn2reg", "empire10", "nifti", "transformix")
NAMES = {
    "itk": (*ENDINGS, *TRANSFORMS),
    "grand-challenge": (".mha", ".mhd"),
    "learn2reg": (".nii.gz", ".npz"),
    "nifti": (".nii.gz", ".nii"),
    "transformix": (".txt",),
}
"""The endings of file names, by format."""


def main(arguments: list[str] | None = None, program: str = "python -m evaluation.convert") -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: convert(_parser(program).parse_args(arguments)))


def convert(options: argparse.Namespace) -> None:
    """Convert a field; CaseError and InputError for mistakes that the user can correct."""
    out: Path = options.out
    kind = options.to or _kind(out)
    _check_name(out, kind)
    fixed: Grid | None
    moving: Grid | None
    fixed, moving = (None if path is None else read_grid(path) for path in (options.fixed, options.moving))
    whole = transform_of(options.field, options.inverse) if is_result(options.field) and is_transform(out) else None
    field, moving = (None, None) if whole else _field(options, fixed, moving)
    if kind == "empire10":
        prepare_folder(out)
    else:
        prepare_file(out)
    with all_or_nothing(out if kind == "empire10" else out.parent) as partial:
        try:
            if field is None:
                sitk.WriteTransform(sitk.ReadTransform(str(whole)), str(partial / out.name))
            else:
                _write(field, kind, partial / out.name, out.parent, moving, options.channels_first)
        except RuntimeError as error:  # SimpleITK
            raise OSError(f"{out}: cannot be written ({error})") from error


def _field(options: argparse.Namespace, fixed: Grid | None, moving: Grid | None) -> tuple[sitk.Image, Grid | None]:
    """The field, and the moving grid if it is known."""
    if not is_result(options.field):
        if options.inverse:
            raise InputError("--inverse: expected the folder of a result in place of a field")
        return read_field(options.field, fixed, moving), moving
    field, other = result_field(options.field, options.inverse)
    return field, other if moving is None else moving


def _write(field: sitk.Image, kind: str, path: Path, to: Path, moving: Grid | None, channels_first: bool) -> None:
    if kind == "nifti":
        write_nifti_vectors(field, path)
    elif kind == "transformix":
        write_transformix(field, path, to)
    elif kind == "learn2reg":
        write_learn2reg(field, path, moving, channels_first)
    elif kind == "empire10":
        write_empire10(field, path.parent)
    elif kind == "grand-challenge":
        write_grand_challenge(field, path)
    elif is_transform(path):
        write_transform(field, path)
    else:
        write_itk(field, path)


def _kind(out: Path) -> str:
    if is_learn2reg(out):
        return "learn2reg"
    if out.suffix == ".txt":
        return "transformix"
    return "itk" if out.suffix else "empire10"


def _check_name(out: Path, kind: str) -> None:
    if printable(str(out)) != str(out):
        raise InputError(f"{out}: is not in UTF-8, expected a name that is")
    if kind == "empire10":
        if out.suffix in (".npz", ".gz", *ENDINGS, *TRANSFORMS):
            raise InputError(f"{out.name}: is no name for empire10, expected that of a folder")
        return
    if not out.name.endswith(NAMES[kind]):
        raise InputError(f"{out.name}: is no name for {kind}, expected one that ends in {', '.join(NAMES[kind])}")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Convert a displacement field.")
    parser.add_argument("field", type=Path, metavar="FIELD", help="file, EMPIRE10 folder, or folder of a result")
    parser.add_argument("out", type=Path, metavar="OUT", help="file, or EMPIRE10 folder")
    parser.add_argument("--to", choices=FORMATS, help="format of OUT; by default its name says")
    parser.add_argument(
        "--fixed", type=Path, metavar="IMAGE", help="any image on the fixed grid: Learn2Reg, transforms"
    )
    parser.add_argument("--moving", type=Path, metavar="IMAGE", help="the same for the moving grid, where it differs")
    parser.add_argument("--inverse", action="store_true", help="of a result, from the moving to the fixed scan")
    parser.add_argument("--channels-first", action="store_true", help="Learn2Reg: (3, X, Y, Z), not (X, Y, Z, 3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
