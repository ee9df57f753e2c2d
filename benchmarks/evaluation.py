"""Time and memory of the evaluation of one large case: landmarks, five lobes, a field on the full grid.

python -m benchmarks.evaluation OUT [--size 512 512 300]

The case is a phantom at a quarter of the resolution, resampled and written to OUT. Time (s) and peak memory (GB) are
those of `python -m evaluation` and its worker, with and without the page.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import SimpleITK as sitk

FILES = ("fixed_landmarks.csv", "moving_landmarks.csv")


def enlarged(image: sitk.Image, size: tuple[int, int, int], interpolator: int) -> sitk.Image:
    """The image resampled to ``size`` voxels in the same box."""
    spacing = [extent * n / m for extent, n, m in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
    shift = [(s - old) / 2 for s, old in zip(spacing, image.GetSpacing(), strict=True)]  # phantoms lie along the axes
    origin = [o + s for o, s in zip(image.GetOrigin(), shift, strict=True)]
    identity = sitk.Transform(3, sitk.sitkIdentity)
    return sitk.Resample(image, size, identity, interpolator, origin, spacing, image.GetDirection())


def make_case(out: Path, size: tuple[int, int, int]) -> None:
    """Write OUT/ground_truth/phantom and OUT/predictions/phantom.mha."""
    small, truth = out / "small", out / "ground_truth" / "phantom"
    quarter = [str(max(16, n // 4)) for n in size]
    subprocess.run([sys.executable, "-m", "phantom", str(small), "--size", *quarter], check=True)
    for folder in (truth, out / "predictions"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("fixed_lobes.mha", "moving_lobes.mha"):
        labels = enlarged(sitk.ReadImage(str(small / name)), size, sitk.sitkNearestNeighbor)
        sitk.WriteImage(labels, str(truth / name))
    field = sitk.ReadImage(str(small / "displacement_field.mha"))
    sitk.WriteImage(enlarged(field, size, sitk.sitkLinear), str(out / "predictions" / "phantom.mha"))
    for name in FILES:
        shutil.copy(small / name, truth)


def main() -> None:
    """Print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 300))
    arguments = parser.parse_args()
    x, y, z = arguments.size
    make_case(arguments.out, (x, y, z))
    command = [sys.executable, "-m", "evaluation", f"--input={arguments.out / 'predictions'}"]
    command += [f"--ground-truth={arguments.out / 'ground_truth'}", f"--output={arguments.out / 'results'}"]
    for options in ([], ["--no-report"]):
        start = time.monotonic()
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        print(f"{' '.join(options) or 'with the page'}: {time.monotonic() - start:.1f} s")
    print(f"at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.1f} GB in a process")


if __name__ == "__main__":
    main()
