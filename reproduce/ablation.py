"""The cascades of `training.ablation` on the pairs: their fields as they are, nothing refined, no folding repaired."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from algorithm.cascade.network import Cascade
from algorithm.cascade.weights import MANIFEST, load_cascade, manifest_of
from algorithm.errors import InputError
from algorithm.fields.transform import Transform
from algorithm.files.images import read_image
from algorithm.files.writing import write_field
from algorithm.preparation.prepare import Prepared, prepare
from algorithm.preparation.subject import find_lungs

from .pairs import Pair
from .published import published
from .runs import Fields, Runs, counted

log = logging.getLogger(__name__)


def trainings(folder: Path) -> dict[str, list[Path]]:
    """The finished trainings of the paper's configurations, by configuration; InputError where there are none."""
    configurations = published("table2")["configurations"]
    found: dict[str, list[Path]] = {}
    for manifest in sorted(folder.glob(f"*_*/weights/{MANIFEST}")):
        training = manifest.parent.parent
        configuration = training.name.rpartition("_")[0]
        if configuration in configurations and _finished(manifest.parent):
            found.setdefault(configuration, []).append(training)
    if not found:
        raise InputError(f"{folder}: holds no trainings, expected what python -m training.ablation --out writes")
    return found


def trained(folder: Path) -> str:
    """A sentence on the trainings: how many, and their steps by level, coarse to fine."""
    all_of_them = [training for of in trainings(folder).values() for training in of]
    settings = [manifest_of(training / "weights").get("training", {}).get("settings", {}) for training in all_of_them]
    longest = max((tuple(of.get("steps", ())) for of in settings), key=len)
    steps = f", {', '.join(map(str, longest))} steps from coarse to fine" if longest else ""
    return f"Ablation: {len(all_of_them)} trainings{steps}."


def _finished(weights: Path) -> bool:
    """Whether all levels were trained."""
    manifest = manifest_of(weights)
    levels = manifest.get("training", {}).get("levels")
    return levels is None or bool(levels == len(manifest["settings"]["factors"]))


def ablation_fields(runs: Runs, folder: Path, pairs: Sequence[Pair]) -> Fields:
    """The field of every training on every pair, on the network's grid around the lungs, by configuration and seed."""
    folders = [training for of in trainings(folder).values() for training in of]
    cascades = {training.name: load_cascade(training / "weights") for training in folders}
    fields: Fields = {name: {pair: runs.folder(name, pair) / "field.mha" for pair in pairs} for name in cascades}

    def missing(pair: Pair) -> list[str]:
        return [
            n for n, c in cascades.items() if not runs.there(runs.folder(n, pair), runs.made_from(pair, n, c.sha256))
        ]

    for pair in counted([pair for pair in pairs if missing(pair)], lambda pair: f"{pair.name}, ablation"):
        ready: dict[tuple[int, int, int], Prepared | str] = {}
        for name in missing(pair):
            cascade, sha256 = cascades[name].cascade, cascades[name].sha256
            size = cascade.settings.network_size
            prepared = ready[size] = ready.get(size) or _prepared(pair, size)
            if isinstance(prepared, str):
                fields[name][pair] = prepared
                continue
            folder = runs.folder(name, pair)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "field.mha", prepared, cascade)
            runs.note(folder, runs.made_from(pair, name, sha256))
    return fields


def _prepared(pair: Pair, network_size: tuple[int, int, int]) -> Prepared | str:
    """The pair as the networks see it, or the sentence why it cannot be registered."""
    try:
        fixed, moving = (find_lungs(read_image(pair.folder / f"{scan}.mha"), None) for scan in ("fixed", "moving"))
        return prepare(fixed, moving, network_size)
    except InputError as error:
        return str(error)


@torch.no_grad()
def _write(path: Path, pair: Prepared, cascade: Cascade) -> None:
    displacement, grid = cascade(pair.fixed, pair.grid, pair.moving, pair.moving_grid)
    write_field(path, grid, [Transform(displacement, grid, pair.affine).field(grid)], "itk")
