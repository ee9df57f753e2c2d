"""All settings that decide the result of a training, and reading them from override files (training/config)."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from algorithm.cascade.network import CascadeSettings
from algorithm.errors import InputError
from algorithm.objective import Weights

CONFIG = Path(__file__).parent / "config"


@dataclass(frozen=True)
class TrainSettings:
    """All settings that decide the result; they are stored in the checkpoint.

    All tuples except ``features`` have one value per level, coarse to fine. InputError for a wrong number of values, or
    for a value out of range.
    """

    features: tuple[int, ...] = CascadeSettings().features
    factors: tuple[int, ...] = CascadeSettings().factors
    applications: tuple[int, ...] = (1, 1, 1)
    """All three as in `CascadeSettings`. Training does all applications. Each starts from the result of the one before,
    without a gradient between them, and all have the same weight in the loss."""
    steps: tuple[int, ...] = (2000, 2000, 1000)
    learning_rate: float = 3e-3
    """Learning rate at the start of a level. A cosine decreases it to a tenth."""
    muon: bool = True
    """Muon for the convolutions. Otherwise Adam for all parameters, which needs a learning rate of 1e-3."""
    seed: int = 1
    keep_finer: bool = False
    """Levels finer than a trained level keep their parameters (to retrain a coarse level). Otherwise they get the
    parameters of the trained level."""
    distance: Literal["ngf", "ncc"] = "ngf"
    """Normalised gradient fields or local correlation, both over the lungs."""
    alpha: tuple[float, ...] = (10.0, 10.0, 10.0)
    """Weight of the curvature (mm²)."""
    diffusion: tuple[float, ...] = (0.0, 0.0, 0.0)
    beta: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Weight of the lung masks."""
    gamma: tuple[float, ...] = (0.04, 0.04, 0.04)
    """Weight of the volume change."""
    delta: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Weight of the keypoints (1/mm²), as in the paper (mean squared distance); here voxels with exact partners."""
    exact: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Weight of the mean distance from the exact field in the lungs (1/mm)."""
    t: tuple[float, ...] = (0.2, 0.1, 0.05)
    epsilon_hu_per_mm: tuple[float, ...] = (3.0, 5.0, 10.0)
    """Edge parameter of the NGF distance; the paper calls 0.1 to 10 suitable for CT."""
    window: int = 9
    """Edge of the windows of the local correlation, in voxels; odd."""
    keypoints: int = 4096
    """Number of lung voxels drawn as keypoints in every step, if ``delta`` is above 0."""
    reduction: tuple[int, ...] = (2, 2, 1)
    """Downsampling (1 or 2) of the pairs that a level is trained on. To save time, the coarse level warps at twice its
    resolution and the middle level at its own."""
    crop: tuple[int, ...] = (0, 0, 96)
    """Edge of the part of the fixed image that a step uses (x, y, z voxels, at most the image); 0: the whole image."""
    scale: float = 0.12
    """Maximum relative change of each voxel edge, which simulates lungs of other sizes and shapes."""
    breath_holds: float = 0.5
    """Share of breath-holds among the simulated pairs; the other pairs breathe at rest."""

    def __post_init__(self) -> None:
        if not self.factors or not self.features or min(self.features) < 1:
            raise InputError(f"features {self.features}, factors {self.factors}: expected some, all of them positive")
        for name in PER_LEVEL:
            if len(getattr(self, name)) != len(self.factors):
                raise InputError(
                    f"{name} is {getattr(self, name)}, expected {len(self.factors)} values, one for each level of the "
                    f"factors {self.factors}"
                )
        if min(self.steps) < 0 or min(self.learning_rate, self.scale) < 0:
            raise InputError(
                f"steps {self.steps}, learning_rate {self.learning_rate}, scale {self.scale}: none may be negative"
            )
        if self.window < 1 or self.window % 2 == 0:
            raise InputError(f"window is {self.window}, expected an odd number of voxels")
        for level in range(len(self.factors)):
            self.weights(level)
            self._check_sizes(level)

    def _check_sizes(self, level: int) -> None:
        """Check that factors are powers of two, and that the U-Net can halve the crop as often as it needs."""
        factor, reduction, crop = self.factors[level], self.reduction[level], self.crop[level]
        if factor < 1 or factor & (factor - 1) or reduction not in (1, 2) or factor % reduction:
            raise InputError(
                f"level {level}: factor {factor}, reduction {reduction}; expected a power of two, and 1 or 2 of it"
            )
        multiple = factor // reduction * 2 ** (len(self.features) - 1)
        if crop < 0 or crop % multiple:
            raise InputError(f"level {level}: crop is {crop}, expected a multiple of {multiple}")

    def weights(self, level: int) -> Weights:
        """The objective's weights of one level."""
        return Weights(**{field.name: getattr(self, field.name)[level] for field in fields(Weights)})


_TYPES = get_type_hints(TrainSettings)
PER_LEVEL = tuple(name for name, type_ in _TYPES.items() if get_origin(type_) is tuple and name != "features")


def read_settings(path: Path | None = None, **overrides: Any) -> TrainSettings:
    """The defaults, overridden by a TOML file with fields of `TrainSettings`, then by ``overrides`` (None: not given).

    With fewer ``factors``, the remaining levels have the defaults of the finest ones. InputError if the file cannot be
    read, has an unknown setting, or has a value of another type.
    """
    try:
        values = tomllib.loads(path.read_text()) if path else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the settings cannot be read ({error})") from error
    unknown = sorted(values.keys() - _TYPES.keys())
    if unknown:
        raise InputError(f"{path}: unknown setting {', '.join(unknown)}; there are {', '.join(_TYPES)}")
    values = {name: _converted(f"{path}: {name}", _TYPES[name], value) for name, value in values.items()}
    values |= {name: value for name, value in overrides.items() if value is not None}
    levels = len(values.get("factors", TrainSettings().factors))
    defaults = {name: getattr(TrainSettings(), name)[-levels:] for name in PER_LEVEL}
    return TrainSettings(**(defaults | values))


def _converted(name: str, expected: Any, value: Any) -> Any:
    """A TOML value as a value of the type ``expected``; an integer may stand for a float."""
    if get_origin(expected) is tuple and isinstance(value, list):
        return tuple(_converted(name, get_args(expected)[0], entry) for entry in value)
    if expected is float and type(value) is int:
        return float(value)
    if value not in get_args(expected) if get_origin(expected) is Literal else type(value) is not expected:
        raise InputError(f"{name} is {value!r}, expected {_in_words(expected)}")
    return value


def _in_words(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return " or ".join(repr(choice) for choice in get_args(expected))
    if get_origin(expected) is tuple:
        return f"a list of {get_args(expected)[0].__name__}"
    return str(expected.__name__)
