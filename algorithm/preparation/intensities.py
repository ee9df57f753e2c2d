"""Check that the values of a scan are Hounsfield units. Stored values are corrected, other values are refused.

A chest in HU has air and lung between -1100 and -200, and hardly any voxel between 600 and 1300. In a scanner's stored
values (HU + 1024, rarely + 1000) it is the opposite: soft tissue lies about 1000 above the air, near 1074. Values that
could be HU are never changed: the test for HU comes first, and the test for an offset needs all signs of a chest.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Num
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..files.images import Image
from ..hounsfield import AIR_HU

SAMPLE = 1_000_000
"""Approximate number of voxels that are checked, evenly distributed."""
AIR_OR_LUNG_HU, LEAST_AIR = (-1100.0, -200.0), 0.002
DENSE_HU, MOST_DENSE = (600.0, 1300.0), 0.1
"""Range denser than contrast-enhanced blood, and its largest share: cortical bone and metal, a few per cent of a chest.
"""
SOFT_HU, LEAST_SOFT = (-150.0, 200.0), 0.05
BONE_HU, LEAST_BONE = 130.0, 0.001
EMPTY_HU, MOST_EMPTY = -1150.0, 0.002
"""Values below those of air with noise, and their largest share."""
LEAST_FLOOR = 0.01
"""The lowest value is padding (or clipped air) when at least this share of the voxels has exactly that value."""
CEILING, LEAST_CEILING = 2500.0, 0.02
"""The same for the highest value, when it is above all tissue. Metal covers a smaller share."""
OFFSETS = (1024, 1000)
LEAST_HU = -1024
"""Lower limit (HU) at which scans in stored values are clipped after the subtraction."""
Values = NDArray[np.float32]


def in_hounsfield_units(image: Image) -> Image:
    """The scan in HU, of the same type. An image that is already in HU is returned itself.

    High padding becomes air, stored values become HU; both add a sentence to `Image.remarks`. InputError when the
    values cannot be HU: scaled (to 0..1 or 0..255), windowed without the lungs, or of inverted sign.
    """
    sample = _sample(image.voxels)
    ceiling = float(sample.max())
    if ceiling >= CEILING and LEAST_CEILING <= (sample == ceiling).mean() < 1:
        sample = sample[sample < ceiling]
        voxels = image.voxels.masked_fill(image.voxels == ceiling, int(AIR_HU))
        image = _remarked(replace(image, voxels=voxels), f"the padding of {ceiling:g} was replaced by air")
    sample = _without_floor(sample)
    if _like_hu(sample):
        return image
    if not _like_hu_with_offset(sample):
        raise InputError(f"{image.path}: {_found(sample)}")
    offset = _offset(sample)
    voxels = image.voxels.clamp(min=offset + LEAST_HU).sub_(offset)
    return _remarked(
        replace(image, voxels=voxels),
        f"the values are not Hounsfield units but lie about {offset} higher (soft tissue near "
        f"{np.median(sample[_within(sample - offset, SOFT_HU)]):.0f}); {offset} was subtracted",
    )


def _remarked(image: Image, remark: str) -> Image:
    return replace(image, remarks=(*image.remarks, f"{image.path.name}: {remark}."))


def _sample(voxels: Num[Tensor, "1 1 z y x"]) -> Values:
    step = int(np.ceil((voxels.numel() / SAMPLE) ** (1 / 3)))
    return voxels[0, 0, ::step, ::step, ::step].flatten().to(torch.float32).numpy()


def _without_floor(sample: Values) -> Values:
    """The sample without padding and clipped air, which prove nothing; the whole sample if it has only one value."""
    lowest = sample.min()
    is_floor = LEAST_FLOOR <= (sample == lowest).mean() < 1
    return sample[sample > lowest] if is_floor else sample


def _within(values: Values, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    return (values > low) & (values < high)


def _like_hu(sample: Values) -> bool:
    """Whether the values look like HU. Constant images pass, too: a later step finds that they have no lung."""
    air, dense = _within(sample, AIR_OR_LUNG_HU).mean(), _within(sample, DENSE_HU).mean()
    return bool((air >= LEAST_AIR and dense < MOST_DENSE) or sample.min() == sample.max())


def _like_hu_with_offset(sample: Values) -> bool:
    """Whether there are all signs of a chest, 1024 higher: air or lung, soft tissue, bone or contrast, no value below
    air.

    The last three exclude scaled values, values scaled to 0..1000, and HU of inverted sign.
    """
    hu = sample[sample > AIR_OR_LUNG_HU[0]] - np.float32(OFFSETS[0])
    if not len(hu):
        return False
    soft, bone, empty = _within(hu, SOFT_HU).mean(), (hu > BONE_HU).mean(), (hu < EMPTY_HU).mean()
    return bool(_like_hu(hu) and soft >= LEAST_SOFT and bone >= LEAST_BONE and empty < MOST_EMPTY)


def _like_inverted_hu(sample: Values) -> bool:
    """Whether muscle and blood are below zero, and air or lung far above."""
    return bool(min((sample < -30).mean(), _within(sample, (700.0, 1100.0)).mean()) > 0.01)


def _offset(sample: Values) -> int:
    """1000 if there is air and it lies around 0 rather than around 24, else 1024."""
    air = sample[_within(sample, (-100.0, 100.0))]
    return OFFSETS[1] if len(air) > 0.01 * len(sample) and np.median(air) < 12 else OFFSETS[0]


def _found(sample: Values) -> str:
    low, median, high = np.percentile(sample, [1, 50, 99])
    inverted = ", with the sign not inverted" if _like_inverted_hu(sample) else ""
    return (
        f"has values from {low:.4g} to {high:.4g} (1st to 99th percentile, median {median:.4g}), expected Hounsfield "
        f"units: about -1000 in air, -850 in lungs, 0 to 100 in soft tissue{inverted}"
    )
