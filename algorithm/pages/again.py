"""``lungreg report``: report.html of a result that lies in a folder, made from its files and the two scans."""

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
    """Writes report.html into the folder of a result, in place of an earlier one of ours; its path.

    ``fixed`` and ``moving`` are the scans, where they are not any more where the registration found them. InputError
    where the folder holds no result, the scans are missing or others, or a report.html that is none of ours is there.
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
        check_page(page, (fixed, moving))  # again: it may have come in the meantime
        write_text(page, text)
    return page


def _transform(result: Result) -> Transform:
    """With the affine map of the pre-alignment apart also where only the whole field was kept: where the scans lie far
    apart, the page compares them after that."""
    transform, said = result.transform, result.figures.get("prealignment")
    if transform.affine != Affine() or said is None:
        return transform
    affine = Affine.from_arrays(np.array(said["matrix"]), np.array(said["offset"]))
    displacement = with_affine(transform.displacement, transform.grid, affine.inverse())
    return Transform(displacement, transform.grid, affine)
