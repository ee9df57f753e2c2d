"""The command ``lungreg 4d``. Large libraries are imported only when it is called."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options import HELP, Device, Refine

EXAMPLES = """
Ten phases of a 4DCT in a folder, phase_00.mha to phase_90.mha, and a tumour that was drawn on phase 50:

lungreg 4d phases out --reference 50 --structures gtv.nii.gz
"""


def sequence(
    phases: Annotated[Path, Parameter(help="a folder with one image, or one folder of a DICOM series, per phase")],
    out: Annotated[Path, Parameter(help="a new folder for the results")],
    /,
    *,
    reference: Annotated[
        int, Parameter(help="number in the name of the reference phase, to which the others are registered")
    ],
    structures: Annotated[Path | None, Parameter(help="a label map, drawn on the reference")] = None,
    refine: Annotated[Refine, Parameter(help=HELP["refine"])] = "full",
    device: Annotated[Device, Parameter(help=HELP["device"])] = "auto",
) -> None:
    """Follow structures through the phases of breathing: contours, ITV, motion in mm, mid-position image."""
    from .sequence import follow_and_say

    print(follow_and_say(phases, reference, structures, out, refine, device))
