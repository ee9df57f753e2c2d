"""Draws example.png from a run on the phantom: python docs/figure.py EXAMPLE (the folder that register.sh makes)."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

CT = {"cmap": "gray", "vmin": -1000, "vmax": 200}
DIFFERENCE = {"cmap": "gray", "vmin": -500, "vmax": 500}


def result(example: Path, name: str, kind: int = sitk.sitkFloat32) -> sitk.Image:
    """The only image in one of the folders of results."""
    (file,) = (example / "output" / "images" / name).glob("*.mha")
    return sitk.ReadImage(str(file), kind)


def coronal(image: sitk.Image) -> np.ndarray:
    """The middle slice, head up."""
    voxels = sitk.GetArrayFromImage(image).astype(float)
    return voxels[::-1, voxels.shape[1] // 2]


def main() -> None:
    """Coronal slices: both scans, the differences before and after, volume change, expected error."""
    example = Path(sys.argv[1])
    fixed, moving = (sitk.ReadImage(str(example / f"{name}.mha"), sitk.sitkFloat32) for name in ("fixed", "moving"))
    before = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkLinear, -1000)
    determinant = sitk.DisplacementFieldJacobianDeterminant(
        result(example, "displacement-field", sitk.sitkVectorFloat64)
    )
    error = coronal(result(example, "expected-error"))
    lungs = error >= 0
    aspect = fixed.GetSpacing()[2] / fixed.GetSpacing()[0]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")

    def show(axis: Axes, title: str, values: np.ndarray, style: dict[str, object]) -> AxesImage:
        axis.set_title(title)
        axis.axis("off")
        return axis.imshow(values, aspect=aspect, **style)

    show(axes[0, 0], "fixed", coronal(fixed), CT)
    show(axes[0, 1], "before: fixed - moving", coronal(fixed - before), DIFFERENCE)
    picture = show(axes[0, 2], "after: fixed - warped", coronal(fixed - result(example, "warped-moving")), DIFFERENCE)
    figure.colorbar(picture, ax=axes[0, 2], label="HU", shrink=0.8)
    show(axes[1, 0], "moving", coronal(before), CT)
    colours = (
        (axes[1, 1], "volume change (Jacobian determinant)", coronal(determinant), "volume in moving / in fixed",
         {"cmap": "PuOr_r", "vmin": 0.5, "vmax": 1.5}),
        (axes[1, 2], "expected error", error, "mm", {"cmap": "cividis", "vmin": 0, "vmax": 2}),
    )  # fmt: skip
    for axis, title, values, label, style in colours:
        show(axis, title, coronal(fixed), CT)
        picture = show(axis, title, np.where(lungs, values, np.nan), style)
        figure.colorbar(picture, ax=axis, label=label, shrink=0.8)
    figure.savefig(Path(__file__).parent / "example.png", dpi=80)


if __name__ == "__main__":
    main()
