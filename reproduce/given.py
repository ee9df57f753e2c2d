"""What a page is made of: what the user gave on the command line, and what is said of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algorithm.errors import InputError

from .pairs import Pair
from .runs import NAMES, Runs


class NoPairsError(InputError):
    """None of the pairs can be used for a table or figure; another one may have some."""


@dataclass(frozen=True)
class Given:
    """The command line."""

    pairs: Sequence[Pair]
    runs: Runs
    ablation: Path | None
    """The folder that `training.ablation` wrote its trainings into."""

    def chosen(self, test: Callable[[Pair], object], why_not: str) -> tuple[list[Pair], list[str]]:
        """The pairs that pass, and a sentence on those that do not; NoPairsError where none passes."""
        taken = [pair for pair in self.pairs if test(pair)]
        others = [pair.name for pair in self.pairs if pair not in taken]
        if not taken:
            raise NoPairsError(f"none of the {len(others)} pairs can be used, for instance {others[0]}: {why_not}")
        return taken, [f"{', '.join(others)}: {why_not}."] if others else []

    def dirlab(self) -> tuple[list[Pair], list[str]]:
        """The DIR-Lab 4DCT pairs in the order of their numbers, and a sentence on the others."""
        taken, others = self.chosen(
            lambda pair: pair.dirlab,
            "not the 300 landmarks of a DIR-Lab 4DCT case, as far apart before registration as published",
        )
        return sorted(taken, key=lambda pair: pair.dirlab or 0), others

    def lobes(self) -> tuple[list[Pair], list[str]]:
        """The pairs with lobes, and a sentence on the others."""
        return self.chosen(lambda pair: pair.has_lobes, "no fixed_lobes.mha and moving_lobes.mha")

    def made_with(self, methods: Sequence[str], pairs: Sequence[Pair]) -> list[str]:
        """Sentences: pairs with their voxels, versions, weights and devices, from the results."""
        found = [
            (method, pair, self.runs.said(method, pair))
            for method in methods
            for pair in pairs
            if self.runs.has(method, pair)
        ]
        if not found:
            return []
        voxels = {pair.name: " × ".join(f"{s:.3g}" for s in said["grids"]["fixed"]["spacing"])
                  for _, pair, said in found if "grids" in said}  # fmt: skip
        weights = {said["weights_sha256"][:12] for _, _, said in found if "weights_sha256" in said}
        return [
            f"{len(pairs)} pairs, voxels of the fixed scan in mm: "
            + ", ".join(f"{name} {size}" for name, size in voxels.items()) + ".",
            "Methods: " + ", ".join(dict.fromkeys(NAMES[method] for method, _, _ in found)) + ".",
            f"Version {', '.join(sorted({said['version'] for _, _, said in found}))}"
            + (f", weights {', '.join(sorted(weights))}" if weights else "")
            + f", device {', '.join(sorted({said['device'] for _, _, said in found}))}.",
        ]  # fmt: skip
