"""Smooth fields of real motion in the box around the lungs, from dense correspondences of real pairs.

    python -m training.real_motion --real lung250m/*.csv --l2r keypoints/*.csv --out runs/real_motion.npz

Correspondences are noisy. So each vector is replaced by the median of its nearest neighbours, and a smoothing spline
(polyharmonic, with the distance as kernel) is fitted to a part of them. Positions and vectors are relative to the edges
of the box around the points, so that `training.random_motion` can scale them to the lungs of another patient.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree

from algorithm.errors import InputError, exit_code
from training.data import save_arrays
from training.motion import L2R_SPACING_MM, correspondences

log = logging.getLogger(__name__)

VOXELS = 24
"""Number of voxels of the fields along each axis."""
NEAREST = 12
CONTROL_POINTS = 1200
SMOOTHING = 0.02
"""Smoothing of the spline, in units of the box: for noise of a hundredth of the box."""


def relative_motion(
    points: Float[np.ndarray, "p 3"], vectors: Float[np.ndarray, "p 3"]
) -> Float[np.ndarray, "3 n n n"]:
    """The field of the correspondences (mm) at the voxel centres of the box (z, y, x), relative to the box's edges."""
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    places, values = (points - low) / (high - low), vectors / (high - low)
    _, near = cKDTree(places).query(places, NEAREST)
    values = np.median(values[near], axis=1)
    chosen = np.random.default_rng(0).permutation(len(places))[:CONTROL_POINTS]
    spline = RBFInterpolator(places[chosen], values[chosen], kernel="linear", degree=1, smoothing=SMOOTHING)
    centres = (np.arange(VOXELS) + 0.5) / VOXELS
    z, y, x = np.meshgrid(centres, centres, centres, indexing="ij")
    field: np.ndarray = spline(np.column_stack([x.ravel(), y.ravel(), z.ravel()]))
    return field.T.reshape(3, VOXELS, VOXELS, VOXELS).astype(np.float32)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="csv files in mm")
    parser.add_argument("--l2r", type=Path, nargs="*", default=[], help="csv files in Learn2Reg voxels")
    parser.add_argument("--out", type=Path, required=True, help=".npz file")
    arguments = parser.parse_args()
    pairs = [correspondences(path) for path in arguments.real]
    pairs += [correspondences(path, L2R_SPACING_MM) for path in arguments.l2r]
    if not pairs:
        raise InputError("no correspondences were given, expected csv files (--real, --l2r)")
    fields = np.stack([relative_motion(*pair) for pair in pairs])
    names = np.array([path.stem for path in (*arguments.real, *arguments.l2r)])
    save_arrays(arguments.out, {"fields": fields, "names": names})
    log.info("%s: the motion of %d pairs", arguments.out, len(fields))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
