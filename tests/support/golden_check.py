"""Does a registration's output hold what it held when the expectation was stored?

    python -m tests.support.golden_check OUTPUT EXAMPLE [off]

OUTPUT, of ``--refine full`` or off, is what the algorithm wrote, by command line or container, for the phantom pair in
EXAMPLE. Only SimpleITK and the written files are used, as any user would: the landmark error through the written field,
the warped image against `sitk.Resample`, and the entries of results.json. The expected numbers stand in
golden/expectation.json; those of ``--refine off`` hold to 0.02 mm, four times the difference between processors that
compute in bfloat16 and those that do not.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

EXPECTATION = Path(__file__).parent / "golden" / "expectation.json"


def read_only_image(folder: Path) -> sitk.Image:
    """The one image of a folder: the platform accepts no second one."""
    files = sorted(folder.iterdir())
    assert len(files) == 1, f"{folder} holds {[f.name for f in files]}, expected one image"
    assert files[0].suffix == ".mha", f"{files[0].name} is no .mha"
    return sitk.ReadImage(str(files[0]))


def read_transform(folder: Path, fixed: sitk.Image) -> sitk.DisplacementFieldTransform:
    """The written field (3-D vectors, or 4-D scalars) as ITK's transform; its grid must be that of `fixed`."""
    field = read_only_image(folder)
    if field.GetDimension() == 4:
        field = sitk.Compose([field[:, :, :, i] for i in range(3)])
    assert field.GetSize() == fixed.GetSize()
    for of_field, of_fixed in (
        (field.GetSpacing(), fixed.GetSpacing()),
        (field.GetOrigin(), fixed.GetOrigin()),
        (field.GetDirection(), fixed.GetDirection()),
    ):
        np.testing.assert_allclose(of_field, of_fixed, atol=1e-6)
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))


def landmark_errors_mm(transform: sitk.Transform, example: Path) -> np.ndarray:
    """|T(x_fixed) - x_moving| for each landmark, shape (n,)."""
    fixed, moving = (
        pd.read_csv(example / f"{name}_landmarks.csv")[["x", "y", "z"]].to_numpy() for name in ("fixed", "moving")
    )
    assert len(fixed) == len(moving) > 0
    mapped = np.array([transform.TransformPoint(point) for point in fixed.tolist()])
    errors: np.ndarray = np.linalg.norm(mapped - moving, axis=1)
    return errors


def check_warped(
    folder: Path, fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, most_hu: float
) -> None:
    """The written warped image is what `sitk.Resample` makes of the written field, where both show the body."""
    ours = sitk.GetArrayFromImage(read_only_image(folder)).astype(float)
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1000.0)).astype(float)
    body = (ours > -950) & (theirs > -950)
    assert body.mean() > 0.05, "the warped image shows no body"
    difference_hu = float(np.median(np.abs(ours - theirs)[body]))
    assert difference_hu <= most_hu, f"warped image and field differ by {difference_hu} HU, expected {most_hu} at most"


def check(output: Path, example: Path, refine: str = "full") -> float:
    """Raises AssertionError where `output`, of ``--refine`` full or off, is not as expected.

    Returns the mean landmark error in mm.
    """
    expected = json.loads(EXPECTATION.read_text())
    fixed, moving = (sitk.ReadImage(str(example / f"{name}.mha"), sitk.sitkFloat32) for name in ("fixed", "moving"))
    tre = expected["tre_mm"][refine]
    before_mm = landmark_errors_mm(sitk.Transform(3, sitk.sitkIdentity), example).mean()
    assert abs(before_mm - expected["before_mm"]) < 0.01, (
        f"this is another pair: {before_mm:.3f} mm, expected {expected['before_mm']}"
    )

    transform = read_transform(output / "images" / "displacement-field", fixed)
    mean_mm = float(landmark_errors_mm(transform, example).mean())
    assert abs(mean_mm - tre["mean"]) <= tre["tolerance"], (
        f"landmark error {mean_mm:.3f} mm, expected {tre['mean']} within {tre['tolerance']}"
    )
    check_warped(output / "images" / "warped-moving", fixed, moving, transform, expected["warped_hu"])
    results = json.loads((output / "results.json").read_text())
    for key, value in expected["results"].items():
        assert results.get(key) == value, f"results.json: {key} is {results.get(key)!r}, expected {value!r}"
    for key in expected["results_also_has"]:
        assert key in results, f"results.json: no {key}"
    return mean_mm


if __name__ == "__main__":
    print(
        f"golden_check: landmark error {check(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]):.3f} mm, as expected"
    )
