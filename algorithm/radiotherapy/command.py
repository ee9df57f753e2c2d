"""The command ``lungreg dicom``. Large libraries are imported only when it is called."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

EXAMPLES = """
The registration of two DICOM series as an object, and structures and dose of the moving scan on the fixed one:

lungreg dicom result out --fixed later --moving earlier --rtstruct RS.dcm --rtdose RD.dcm
"""


def dicom(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    out: Annotated[Path, Parameter(help="a new folder for the results")],
    /,
    *,
    fixed: Annotated[Path, Parameter(help="the folder of the DICOM series that was the fixed scan")],
    moving: Annotated[Path, Parameter(help="the folder of the DICOM series that was the moving scan")],
    rtstruct: Annotated[Path | None, Parameter(help="an RT structure set of either scan")] = None,
    rtdose: Annotated[Path | None, Parameter(help="an RT dose of either scan")] = None,
    of: Annotated[
        Literal["fixed", "moving"] | None,
        Parameter(help="the scan of structures and dose, if their frame of reference does not show it"),
    ] = None,
) -> None:
    """Write a Deformable Spatial Registration object, and map RT structures and dose to the other scan."""
    from .transfer import write_dicom

    print(write_dicom(result, out, fixed, moving, rtstruct, rtdose, of))
