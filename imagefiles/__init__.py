"""Reads image files, for the algorithm and the evaluation, without torch.

SimpleITK interprets the headers (`opened`). `voxels` reads the voxels, because SimpleITK 2.5.7 does not check that all
voxels promised by the header exist: for missing ones it returns zeros or uninitialised memory.
"""

from imagefiles.opened import ENDINGS, ending, open_image, remarks
from imagefiles.stored import FileError
from imagefiles.voxels import read_voxels

__all__ = ["ENDINGS", "FileError", "ending", "open_image", "read_voxels", "remarks"]
