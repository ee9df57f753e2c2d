"""Draws example.png from a run on the phantom: python docs/figure.py EXAMPLE (the folder that register.sh makes)."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import SimpleITK as sitk


def main() -> None:
    """Coronal slices: fixed, moving, and the differences before and after."""
    example = Path(sys.argv[1])
    fixed, moving = (sitk.ReadImage(str(example / f"{name}.mha")) for name in ("fixed", "moving"))
    (warped_file,) = (example / "output" / "images" / "warped-moving").glob("*.mha")
    before = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkLinear, -1000)
    slices = {}
    for name, image in (("fixed", fixed), ("moving", before), ("warped", sitk.ReadImage(str(warped_file)))):
        voxels = sitk.GetArrayFromImage(image).astype(float)
        slices[name] = voxels[::-1, voxels.shape[1] // 2]
    panels = {
        "fixed": (slices["fixed"], -1000, 200),
        "moving": (slices["moving"], -1000, 200),
        "fixed - moving": (slices["fixed"] - slices["moving"], -500, 500),
        "fixed - warped": (slices["fixed"] - slices["warped"], -500, 500),
    }
    aspect = fixed.GetSpacing()[2] / fixed.GetSpacing()[0]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, (title, (values, low, high)) in zip(axes, panels.items(), strict=True):
        axis.imshow(values, cmap="gray", vmin=low, vmax=high, aspect=aspect)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(Path(__file__).parent / "example.png", dpi=80)


if __name__ == "__main__":
    main()
