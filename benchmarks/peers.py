"""Registers one pair with another program, for comparison by `benchmarks.landmarks --method`.

PEERS/bin/python -m benchmarks.peers greedy|convexadam FIXED MOVING FIELD.mha

PEERS is a separate environment: `pip install picsl_greedy convexAdam torch SimpleITK`. FIELD is written as a vector
image of displacements (mm, LPS) on the grid of FIXED. Both start from greedy's affine registration.
"""

import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

AFFINE = "-threads 2 -i fixed moving -a -dof 12 -ia-image-centers -m NCC 4x4x4 -n 100x50x10 -o affine"
DEFORMABLE = "-threads 2 -i fixed moving -it affine -m NCC 2x2x2 -n 100x100x50 -s 1.6vox 0.7vox -o warp"
COMPOSED = "-threads 2 -rf fixed -rc whole -r warp affine"
AFFINE_ALONE = "-threads 2 -rf fixed -rc whole -r affine"


def greedy(fixed: sitk.Image, moving: sitk.Image, deformable: bool = True) -> sitk.Image:
    """picsl_greedy: affine, then deformable, both with local cross-correlation."""
    from picsl_greedy import Greedy3D

    program = Greedy3D()
    program.execute(AFFINE, fixed=fixed, moving=moving, affine=None)
    if deformable:
        program.execute(DEFORMABLE, warp=None)
    program.execute(COMPOSED if deformable else AFFINE_ALONE, whole=None)
    field: sitk.Image = sitk.Cast(program["whole"], sitk.sitkVectorFloat64)
    return field


def convexadam(fixed: sitk.Image, moving: sitk.Image) -> sitk.Image:
    """convexAdam with its default settings, after greedy's affine map, because it works only in voxels of one grid."""
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    affine = sitk.DisplacementFieldTransform(greedy(fixed, moving, deformable=False))
    aligned = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, -1000)
    images = [torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32)) for image in (fixed, aligned)]
    voxels = np.asarray(convex_adam_pt(*images, dtype=torch.float32, device=torch.device("cpu")))
    steps = np.asarray(fixed.GetDirection()).reshape(3, 3) * fixed.GetSpacing()  # one column per axis
    field = sitk.GetImageFromArray(voxels[..., ::-1].astype(np.float64) @ steps.T, isVector=True)
    field.CopyInformation(fixed)
    both = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])  # the last one is applied first
    grid = fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing(), fixed.GetDirection()
    whole: sitk.Image = sitk.TransformToDisplacementField(both, sitk.sitkVectorFloat64, *grid)
    return whole


METHODS = {"greedy": greedy, "convexadam": convexadam}


def main() -> None:
    """Command line."""
    method, fixed, moving, out = sys.argv[1:]
    field = METHODS[method](*(sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving)))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), out)


if __name__ == "__main__":
    main()
