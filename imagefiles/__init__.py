"""Image files as they lie on the disk: the one reader of the algorithm and of the evaluation, without torch.

Headers are SimpleITK's to understand (`opened`); the voxels are read here (`voxels`), because SimpleITK 2.5.7 does not
compare them with what the header promises: it returns zeros, or memory that nobody wrote, for what is missing.
"""

from imagefiles.opened import ENDINGS, ending, open_image, remarks
from imagefiles.stored import FileError
from imagefiles.voxels import read_voxels

__all__ = ["ENDINGS", "FileError", "ending", "open_image", "read_voxels", "remarks"]
