"""The conventional method: minimise the objective for the pair, without training (Rühaak et al. 2017).

    python -m baselines.ruehaak FIXED MOVING OUT [--method ruehaak|refinement]

Rühaak et al., "Estimation of large motion in lung CT by integrating regularized keypoint correspondences into dense
deformable registration", IEEE TMI 2017: NGF, curvature, volume change control and keypoints, coarse to fine, in one
direction, after a linear pre-alignment. Hering et al. 2021 compare with this method. Inputs, outputs and exit codes are
those of ``python -m algorithm``. There are differences to the original: Adam on a control grid
(`algorithm.refinement.refine`) instead of L-BFGS on the voxels, voxels of 2 mm on the finest level, no alignment of
lung masks, and our own pre-alignment and keypoints.

``--method refinement`` is our refinement after the pre-alignment, not Rühaak's method. It has the same levels and
distance, but it adds a diffusion term and takes the mean of both directions. At the finest level it has no keypoints,
because there they are less exact than the images.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from algorithm.cascade.network import CascadeSettings
from algorithm.deliver import deliver
from algorithm.devices import choose_device
from algorithm.errors import exit_code
from algorithm.fields.transform import Transform
from algorithm.files.folders import image_name
from algorithm.files.images import read_image
from algorithm.objective import Weights
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import Subject, find_lungs
from algorithm.refinement.refine import RefineSettings, find_pair_keypoints, refine
from algorithm.registration import checked_transform
from algorithm.report import Report
from algorithm.results.outputs import prepare_outputs, withdraw

CONVENTIONAL = RefineSettings(
    spacing_mm=(8.0, 4.0, 2.0),
    steps=(60, 60, 40),
    both_directions=False,
    similarity="ngf",
    step_vox=0.5,
    mask_margin_vox=2,
    weights=(
        Weights(alpha=40.0, beta=0.0, gamma=0.04, delta=0.02, t=0.2),
        Weights(alpha=40.0, beta=0.0, gamma=0.04, delta=0.02, t=0.1),
        Weights(alpha=40.0, beta=0.0, gamma=0.04, delta=0.02, t=0.05),
    ),
)
"""The terms of Rühaak et al. 2017. α and γ are four times those of Hering et al. 2021 in our normalisation (`Weights`):
4 was the best of four factors by the landmarks of two development pairs. δ is chosen by magnitude."""
REFINEMENT = replace(
    CONVENTIONAL,
    both_directions=True,
    weights=(
        Weights(alpha=10.0, beta=0.0, gamma=0.01, delta=0.02, t=0.2, diffusion=0.8),
        Weights(alpha=10.0, beta=0.0, gamma=0.01, delta=0.01, t=0.1, diffusion=0.8),
        Weights(alpha=10.0, beta=0.0, gamma=0.01, delta=0.0, t=0.05, diffusion=0.8),
    ),
)
"""Our refinement after the pre-alignment."""


def register(
    fixed: Subject, moving: Subject, settings: RefineSettings, device: torch.device, report: Report
) -> Transform:
    """Register two scans; ``report`` gets the quality figures and warnings."""
    with report.timed("prepare"):
        pair = prepare(fixed, moving, CascadeSettings().network_size)
    start, grid = torch.zeros(1, 3, 8, 8, 8, device=device), pair.grid.resized((8, 8, 8))
    with report.timed("keypoints"):
        keypoints = find_pair_keypoints(pair, fixed, start, grid)
    with report.timed("minimise"):
        result = refine(fixed, moving, pair.affine, start, grid, settings, keypoints)
    return checked_transform(pair, fixed, moving, result, report)


def main() -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("fixed", "moving", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--method", choices=("ruehaak", "refinement"), default="ruehaak")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--field-layout", choices=("itk", "grand-challenge"), default="itk")
    arguments = parser.parse_args()
    return exit_code(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Register one case, from files to files."""
    report = Report()
    withdraw(arguments.out)
    outputs = prepare_outputs(arguments.out, image_name(arguments.fixed), (arguments.fixed, arguments.moving))
    device = choose_device(arguments.device, report)
    report.set(method=arguments.method, fixed=arguments.fixed.name, moving=arguments.moving.name, device=str(device))
    with report.timed("read"):
        fixed_image, moving_image = read_image(arguments.fixed), read_image(arguments.moving)
    with report.timed("lungs"):
        fixed, moving = find_lungs(fixed_image, None), find_lungs(moving_image, None)
    for remark in (*fixed.image.remarks, *moving.image.remarks):
        report.warn(remark)
    settings = CONVENTIONAL if arguments.method == "ruehaak" else REFINEMENT
    transform = register(fixed, moving, settings, device, report)
    deliver(outputs, fixed_image.grid, transform, fixed, moving, arguments.field_layout, report)


if __name__ == "__main__":
    sys.exit(main())
