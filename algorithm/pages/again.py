"""``lungreg report``: makes report.html of an existing result from its files and the two scans."""

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..fields.transform import Transform
from ..geometry import Affine, with_affine
from ..results.outputs import sole_writer
from ..results.ownership import OWN_ENTRIES, PAGE, PAGE_MARK, check_page
from ..results.result import Result, read_result, scan_path
from ..results.scans import registered_scan
from ..results.texts import write_text
from .page import registration_page
from .view import Pair


def write_page_again(folder: Path, fixed: Path | None = None, moving: Path | None = None) -> Path:
    """Write report.html into a result folder, in place of an earlier report of this program; returns its path.

    Give ``fixed`` and ``moving`` if the paths of the scans have changed since the registration. InputError if the
    folder holds no result, if the scans are missing or different, or if another program wrote the report.html there.
    """
    result, page = read_result(folder), folder / PAGE
    if missing := OWN_ENTRIES - result.figures.keys():
        raise InputError(f"{folder}: results.json has no {', '.join(sorted(missing))}, expected that of a registration")
    fixed = scan_path(folder, result.figures, "fixed", fixed)
    moving = scan_path(folder, result.figures, "moving", moving)
    check_page(page, (fixed, moving))
    scans = registered_scan(folder, result, "fixed", fixed), registered_scan(folder, result, "moving", moving)
    text = registration_page(Pair(*scans, _transform(result), result.expected), result.figures, PAGE_MARK)
    with sole_writer(folder):
        check_page(page, (fixed, moving))  # again: it may have been written in the meantime
        write_text(page, text)
    return page


def _transform(result: Result) -> Transform:
    """The transform with a separate affine map of the pre-alignment, also if the result holds only the whole field. The
    page needs it: scans that lie far apart are compared after the pre-alignment."""
    transform, said = result.transform, result.figures.get("prealignment")
    if transform.affine != Affine() or said is None:
        return transform
    affine = Affine.from_arrays(np.array(said["matrix"]), np.array(said["offset"]))
    displacement = with_affine(transform.displacement, transform.grid, affine.inverse())
    return Transform(displacement, transform.grid, affine)
