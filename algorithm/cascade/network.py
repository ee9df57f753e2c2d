"""The cascade of U-Nets: sections 3.3 and 3.4 of Hering et al. 2021.

There is one U-Net per level, all of the same architecture. From coarse to fine, each predicts a displacement for the
fixed and the *already warped* moving image at its own resolution. It is composed with the field so far::

    u ← 0
    for each level, coarse to fine:
        repeat, up to the level's number of applications, while v is long enough to matter:
            warped ← moving ∘ (x + u)                       at full resolution
            v      ← UNet(downsampled fixed, downsampled warped)
            u      ← v(x) + u(x + v(x))                     composition

In the paper every level is applied once. Here the same network may be applied several times: each application reduces
the remaining motion, so the level corrects larger motion than one prediction can. The weights' manifest has the
maximum number of applications.

Decisions that the paper leaves open:

- two convolutions per block (with them, three levels at 192×160×192 take the 0.73 TFLOP of the design);
- smoothing before each halving: the binomial filter (1 3 3 1)/8 along every axis, close to a Gaussian of 0.87 voxel,
  centred on the coarser voxels (`downsample`);
- input: HU clipped to the lung window [-1000, 200] and mapped linearly to [0, 1.2], so that the zero padding of the
  convolutions means air, not water;
- output: displacement in *voxels of the level*, so that a finer level can start from the parameters of the coarser
  level; `Cascade` converts it to mm;
- the initial weights of the last convolution are 100 times smaller than Xavier's, so that an untrained network predicts
  about u = 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..geometry import Grid, compose, downsample_by, index_displacement, lengths, warp, world_displacement
from ..hounsfield import AIR_HU

LEAST_STEP_VOX = 0.1
"""Convergence threshold: a level is not applied again when the mean length of its prediction, in voxels of the level,
is smaller."""
WINDOW_HU = (-1000.0, 200.0)


@dataclass(frozen=True)
class CascadeSettings:
    """Settings that are needed to rebuild a cascade from a weights file."""

    features: tuple[int, ...] = (16, 32, 64, 128)
    """Channels at full, 1/2, 1/4, ... of a level's resolution."""
    factors: tuple[int, ...] = (4, 2, 1)
    """Downsampling of each level with respect to the network grid, coarse to fine; powers of two."""
    network_size: tuple[int, int, int] = (192, 160, 192)
    """Voxels (x, y, z) of the network grid."""
    applications: tuple[int, ...] = ()
    """Maximum number of applications of each level, coarse to fine; empty: one of each."""

    def __post_init__(self) -> None:
        given = self.applications
        if given and (len(given) != len(self.factors) or min(given) < 1):
            raise ValueError(f"applications {given}: expected one or more for each of the factors {self.factors}")

    def times(self, level: int) -> int:
        """Maximum number of applications of one level."""
        return self.applications[level] if self.applications else 1

    def to_dict(self) -> dict[str, list[int]]:
        """The settings for JSON."""
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[int]]) -> "CascadeSettings":
        """Inverse of `to_dict`; KeyError for missing names, unknown names are ignored.

        ``applications`` may be missing: older weights do not have it.
        """
        x, y, z = values["network_size"]
        applications = tuple(values.get("applications", ()))
        return cls(tuple(values["features"]), tuple(values["factors"]), (x, y, z), applications)


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers += [
            nn.Conv3d(channels, channels_out, kernel_size=3, padding=1, bias=False),  # the norm removes any bias
            nn.InstanceNorm3d(channels_out, affine=True),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(fixed, warped moving) as two channels → displacement in voxels. Each size is a multiple of 2^(blocks - 1)."""

    def __init__(self, features: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        widths = list(features)
        self.encoder = nn.ModuleList(_block(a, b) for a, b in zip([2, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * b, b, kernel_size=2, stride=2) for b in reversed(widths[:-1]))
        self.decoder = nn.ModuleList(_block(2 * b, b) for b in reversed(widths[:-1]))
        self.last = nn.Conv3d(widths[0], 3, kernel_size=1)
        self.apply(_xavier)
        with torch.no_grad():
            self.last.weight.mul_(0.01)

    def forward(self, images: Float[Tensor, "n 2 z y x"]) -> Float[Tensor, "n 3 z y x"]:
        """Two images scaled by `normalise` → displacement (x, y, z) in voxels."""
        skips: list[Tensor] = []
        values = images
        for level, block in enumerate(self.encoder):
            values = block(F.avg_pool3d(values, 2) if level else values)
            skips.append(values)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            values = block(torch.cat([skips.pop(), up(values)], dim=1))
        with torch.autocast(values.device.type, enabled=False):  # bfloat16 would round 4 voxels to 1/64
            displacement: Tensor = self.last(values.float())
        return displacement


def _xavier(module: nn.Module) -> None:
    """Xavier uniform initialisation (Glorot and Bengio 2010), as for the coarsest network of the paper."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def normalise(hu: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n c z y x"]:
    """HU → network input: the lung window [-1000, 200] HU to [0, 1.2]."""
    return (hu.clamp(*WINDOW_HU) - AIR_HU) / 1000


def fastest_precision(device: torch.device) -> torch.dtype:
    """Precision for the U-Nets: half on a GPU, bfloat16 on CPUs that have instructions for it, else float32."""
    if device.type == "cuda":
        return torch.float16
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # also if ATEN_CPU_CAPABILITY forbids it
        return torch.float32
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


class Cascade(nn.Module):
    """The U-Nets of all levels, coarse to fine, and their composition."""

    def __init__(
        self, settings: CascadeSettings = CascadeSettings(), levels: Sequence[nn.Module] | None = None
    ) -> None:
        """``levels``: networks to use instead of new ones, coarse to fine."""
        super().__init__()
        self.settings = settings
        self.precision = torch.float32
        """Precision of the U-Nets except their last layer. Everything outside them stays in float32."""
        self.levels = nn.ModuleList(levels or [UNet(settings.features) for _ in settings.factors])

    def predict_level(
        self, level: int, fixed: Float[Tensor, "n 1 z y x"], warped: Float[Tensor, "n 1 z y x"], grid: Grid
    ) -> Float[Tensor, "n 3 z y x"]:
        """Displacement (mm) of one level. Both images (HU) and the result are on that level's ``grid``."""
        images = normalise(torch.cat([fixed, warped], dim=1))
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            voxels = self.levels[level](images)
        return world_displacement(voxels, grid)

    def forward(
        self,
        fixed: Float[Tensor, "n 1 z y x"],
        grid: Grid,
        moving: Float[Tensor, "n 1 zm ym xm"],
        moving_grid: Grid,
        levels: int | None = None,
        reduction: int = 1,
    ) -> tuple[Float[Tensor, "n 3 zl yl xl"], Grid]:
        """Displacement field (mm) of the first ``levels`` levels (default: all), and its grid, that of the finest one.

        ``fixed`` (HU) is on the network ``grid``; ``moving`` (HU), pre-aligned, is on any grid of the same world. With
        ``reduction``, both are already coarser than the network grid by this factor (training of coarse levels).
        """
        so_far = None
        for level in range(len(self.settings.factors[:levels])):
            for left in reversed(range(self.settings.times(level))):
                so_far, step = self.add_level(level, fixed, grid, moving, moving_grid, so_far, reduction)
                if left and mean_length_vox(step, so_far[1]) < LEAST_STEP_VOX:
                    break
        if so_far is None:
            raise ValueError("a cascade needs at least one level")
        return so_far

    def add_level(
        self,
        level: int,
        fixed: Float[Tensor, "n 1 z y x"],
        grid: Grid,
        moving: Float[Tensor, "n 1 zm ym xm"],
        moving_grid: Grid,
        so_far: tuple[Float[Tensor, "n 3 zc yc xc"], Grid] | None,
        reduction: int = 1,
    ) -> tuple[tuple[Float[Tensor, "n 3 zl yl xl"], Grid], Float[Tensor, "n 3 zl yl xl"]]:
        """The field after one more application of a level, and the added displacement, both in mm on the same grid.

        ``so_far`` is the field before and its grid (None: no motion). Images are as in `forward`.
        """
        factor = self.settings.factors[level] // reduction
        u, u_grid = so_far or (None, None)
        warped = warp(moving, moving_grid, u, grid, displacement_grid=u_grid)
        level_grid = grid.coarsened(factor)
        step = self.predict_level(level, downsample_by(fixed, factor), downsample_by(warped, factor), level_grid)
        return ((step if so_far is None else compose(step, level_grid, *so_far)), level_grid), step


def mean_length_vox(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> float:
    """Mean length, in voxels of the grid, of a displacement in mm."""
    return float(lengths(index_displacement(displacement.detach(), grid)).mean())
