"""``lungreg slicer``: writes a script that opens a result in 3D Slicer.

The script uses Slicer's functions as its script repository shows them. Slicer applies an ITK transform as one that
resamples images, so transform.h5 on the moving volume warps it onto the fixed one.
"""

import os
from pathlib import Path

from ..errors import InputError
from ..files.folders import images_in
from ..files.writing import atomically
from ..results.ownership import KINDS, TRANSFORMS
from ..results.points import check_new
from ..results.result import read_figures, scan_path

NAME = "open_in_slicer.py"
MARK = "# Written by lung-registration: opens a registration in 3D Slicer."
"""The first line of every such script; a file that begins with it may be replaced."""

SCRIPT = '''@MARK@
#
#     Slicer --python-script @NAME@
#
# The fixed scan, with the registered moving one half over it. "moving" lies where it was: "fixed to moving" as its
# transform (module Transforms) brings it onto the fixed one.

import os

import slicer

HERE = os.path.dirname(os.path.abspath(__file__))
PATHS = {
@PATHS@
}
LUNG_WINDOW_HU = (-1350.0, 150.0)
ERROR_WINDOW_MM = (0.0, 5.0)
ERROR_COLOURS = "vtkMRMLColorTableNodeFileColdToHotRainbow.txt"


def place(path):
    """Beside this script, unless the path is absolute."""
    return os.path.normpath(os.path.join(HERE, path))


def load_scan(path, name):
    """A file, or the folder of a DICOM series."""
    if not os.path.isdir(path):
        return slicer.util.loadVolume(path, {"name": name})
    from DICOMLib import DICOMUtils

    with DICOMUtils.TemporaryDICOMDatabase() as database:
        DICOMUtils.importDicom(path, database)
        loaded = [node for patient in database.patients() for node in DICOMUtils.loadPatientByUID(patient)]
    volume = slicer.mrmlScene.GetNodeByID(loaded[0])
    volume.SetName(name)
    return volume


def show(volume, window, colours=None):
    """With this window, from black to white or by a colour table; what lies below the window then is transparent."""
    display = volume.GetDisplayNode()
    display.SetAutoWindowLevel(False)
    display.SetWindowLevelMinMax(*window)
    if colours is not None:
        display.SetAndObserveColorNodeID(colours)
        display.SetThreshold(window[0], 1e6)
        display.SetApplyThreshold(True)


fixed = load_scan(place(PATHS["fixed"]), "fixed")
warped = slicer.util.loadVolume(place(PATHS["warped"]), {"name": "moving, registered"})
moving = load_scan(place(PATHS["moving"]), "moving")
for volume in (fixed, warped, moving):
    show(volume, LUNG_WINDOW_HU)
if "transform" in PATHS:
    transform = slicer.util.loadTransform(place(PATHS["transform"]))
    transform.SetName("fixed to moving")
if "expected error" in PATHS:
    error = slicer.util.loadVolume(place(PATHS["expected error"]), {"name": "expected error (mm)"})
    show(error, ERROR_WINDOW_MM, ERROR_COLOURS)
slicer.util.setSliceViewerLayers(background=fixed, foreground=warped, foregroundOpacity=0.5, fit=True)
'''


def write_script(
    folder: Path,
    out: Path | None = None,
    fixed: Path | None = None,
    moving: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write the script for the result in ``folder``, by default into this folder; returns a sentence on how to run it.

    Give ``fixed`` and ``moving`` if the paths of the scans have changed since the registration. InputError if a file is
    missing, or if another file has this name and must not be overwritten.
    """
    out = folder / NAME if out is None else out
    if out.suffix != ".py":
        raise InputError(f"{out}: is no name for a script, expected one that ends in .py")
    figures = read_figures(folder)
    paths = {
        "fixed": scan_path(folder, figures, "fixed", fixed),
        "moving": scan_path(folder, figures, "moving", moving),
        "warped": _only_image(folder, KINDS[1]),
    }
    if "inverse_residual_mm" in figures:
        paths["transform"] = folder / TRANSFORMS[0]
    if images_in(folder / "images" / KINDS[2]):
        paths["expected error"] = _only_image(folder, KINDS[2])
    check_new(out, overwrite or _is_own(out))
    start = out.resolve().parent
    lines = "\n".join(f"    {name!r}: {os.path.relpath(path.resolve(), start)!r}," for name, path in paths.items())
    text = SCRIPT.replace("@MARK@", MARK).replace("@NAME@", out.name).replace("@PATHS@", lines)
    with atomically(out) as file:
        file.write(text.encode())
    return f"{out} was written; 3D Slicer opens the registration with: Slicer --python-script {out}"


def _only_image(folder: Path, kind: str) -> Path:
    images = images_in(folder / "images" / kind)
    if len(images) != 1:
        raise InputError(f"{folder}: has {len(images)} images in images/{kind}, expected one")
    return images[0]


def _is_own(path: Path) -> bool:
    try:
        return not path.is_symlink() and path.read_text().startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False
