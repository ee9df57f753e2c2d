"""The command ``lungreg match``. Large libraries are imported only when it is called."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

EXAMPLES = """
Nodules of the earlier scan, which was the moving one, and of the later scan, which was the fixed one:

lungreg match result earlier.csv later.csv followed.csv --radius 10 --days 182
"""


def match(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    prior: Annotated[Path, Parameter(name="PRIOR", help="nodules of the earlier scan: .csv, .fcsv or .mrk.json")],
    now: Annotated[Path, Parameter(name="NOW", help="nodules of the later scan")],
    out: Annotated[
        Path | None, Parameter(name="OUT", help="a new .csv file for the table; without it, the table is printed")
    ] = None,
    /,
    *,
    radius: Annotated[float, Parameter(help="maximum distance (mm) between two positions of the same nodule")] = 10.0,
    prior_is: Annotated[
        Literal["fixed", "moving"], Parameter(help="the scan of the registration that PRIOR belongs to")
    ] = "moving",
    days: Annotated[float | None, Parameter(help="days between the scans, if the files have no column date")] = None,
    ras: Annotated[
        bool, Parameter(help="files that do not name their coordinate system are in RAS, not LPS", negative=())
    ] = False,
    overwrite: Annotated[bool, Parameter(help="replace OUT if it exists", negative=())] = False,
) -> None:
    """Show which nodules of two scans are the same, which are new, which are gone, and how fast they grow."""
    from .match import Matching, match_files

    print(match_files(result, prior, now, out, Matching(radius, prior_is, days, ras), overwrite))
