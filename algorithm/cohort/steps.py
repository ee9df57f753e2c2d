"""The steps of a cohort for one pair: one function per name in `STEPS`.

Each raises InputError if the pair is faulty. Libraries are loaded only when a step has work, so that a job whose pairs
are all done ends at once.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluating import evaluation_module
from ..options import Options
from .done import APPLIED, Outcome, pair_folder, read_outcome
from .gpu import take_gpu
from .overlap import in_turn
from .settings import Settings
from .table import SCANS, Row

Figures = Mapping[str, Any] | None
TRUTH = {"landmarks": "landmarks", "labels": "lobes"}
"""For each kind of truth in the table, its name in the evaluation."""


def concerns(step: str, row: Row, settings: Settings) -> bool:
    """Whether the step has work for this pair."""
    if step == "apply":
        return bool(row.columns("landmarks", "labels"))
    if step == "function":
        return settings.function
    return step != "evaluate" or row.has_truth()


def failed_before(out: Path, step: str, row: Row) -> Outcome | None:
    """The outcome of an earlier step that failed; then this step is not tried."""
    for before in {"check": (), "register": ("check",)}.get(step, ("register",)):
        outcome = read_outcome(out, before, row.subject)
        if outcome is not None and outcome.state != "done":
            return outcome
    return None


def check(row: Row) -> None:
    """InputError if a scan or mask is missing, or its header shows that it cannot be registered."""
    from ..files.images import scan_grid

    for column in (*SCANS, *row.columns("mask", "lobes")):
        path = row.folder / row.cells[column]
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder, expected that of {column} in row {row.line}")
        if not column.endswith("_lobes"):
            scan_grid(path)


def options_for(row: Row, out: Path, settings: Settings) -> Options:
    """The options of a pair's registration."""
    files = {name: row.path(name) for name in (*SCANS, *(f"{s}_{k}" for s in SCANS for k in ("mask", "lobes")))}
    return Options(
        **files,  # type: ignore[arg-type]
        output=pair_folder(out, row.subject),
        weights=None if settings.weights is None else Path(settings.weights),
        device=settings.device,
        refine=settings.refine,
        field_grid=settings.field_grid,
        names="kind",
        transforms=settings.transforms,
        report=settings.report,
    )


def registered(
    rows: Sequence[Row], out: Path, settings: Settings, begin: Callable[[Row], None]
) -> Iterator[tuple[Row, BaseException | None]]:
    """Register pair after pair with the model in memory; yield each when its results are written, or with its error.

    ``begin`` is called before a pair is read. On a GPU, the next pair is read and the last one written at the same
    time.
    """
    if settings.device != "cpu":
        take_gpu()
    from ..cascade.weights import find_weights, load_cascade
    from ..case import Case, compute, read, write
    from ..devices import choose_device
    from ..report import Report
    from ..results.outputs import withdraw

    weights = load_cascade(find_weights(None if settings.weights is None else Path(settings.weights)))
    if weights.sha256 != settings.weights_sha256:
        raise InputError("the weights are others than when the cohort was planned, expected the same; plan it again")
    on_gpu = choose_device(settings.device, Report()).type != "cpu"

    def opened(row: Row) -> Case:
        begin(row)
        options = options_for(row, out, settings)
        withdraw(options.output, False, options.sources())
        return read(options, weights.sha256)

    yield from in_turn(rows, opened, lambda case: compute(case, weights), write, overlap=on_gpu)


def apply(row: Row, out: Path) -> None:
    """Map the pair's landmarks and labels to the other scan, into the folder ``applied`` of its results."""
    from ..results.apply import Applied
    from ..results.apply import apply as apply_to
    from ..results.points import map_points

    result = pair_folder(out, row.subject)
    target = result / APPLIED
    target.mkdir(exist_ok=True)
    for column in row.columns("landmarks", "labels"):
        source, scan = row.folder / row.cells[column], "fixed" if column.startswith("fixed") else "moving"
        other = "moving" if scan == "fixed" else "fixed"
        if "_landmarks" in column:
            name = f"{column}_in_{other}{_points_ending(source)}"
            map_points(result, source, target / name, scan, overwrite=True)  # type: ignore[arg-type]
        else:
            how = Applied(other, "nearest")  # type: ignore[arg-type]
            apply_to(result, [source], target / f"{column}_on_{other}.nii.gz", how, overwrite=True)


def _points_ending(path: Path) -> str:
    from ..files.pointfiles import point_ending

    return point_ending(path) or path.suffix


def function(row: Row, out: Path) -> None:
    """Measure lung function, with lobes if the table has them."""
    from ..function.deliver import Given
    from ..function.deliver import function as measure

    names = [f"{scan}{kind}" for kind in ("", "_mask", "_lobes") for scan in SCANS]
    measure(pair_folder(out, row.subject), Given(**{name: row.path(name) for name in names}))


def evaluate(row: Row, out: Path) -> Figures:
    """The errors of the pair's field if there is truth, as the evaluation measures them for a case."""
    from ..results.ownership import KINDS
    from ..results.resultimages import find_image

    cases, evaluating = evaluation_module("cases"), evaluation_module("evaluate")
    field = find_image(pair_folder(out, row.subject), KINDS[0])
    if field is None:
        raise InputError(
            f"{pair_folder(out, row.subject)}: has no displacement field any more, expected that of the pair"
        )
    with tempfile.TemporaryDirectory() as temporary:
        truth = Path(temporary) / row.subject
        truth.mkdir()
        for name, path in _truth(row).items():
            (truth / f"{name}{_ending(path)}").symlink_to(path.resolve())
        figures, _ = evaluating.evaluate_case(cases.Case(row.subject, field, truth))
    if figures["error"]:
        raise InputError(figures["error"])
    wanted = ("tre_mm", "tre_snapped_mm", "tre_initial_mm", "dice", "asd_mm", "hd_mm", "hd95_mm", "remarks")
    return {name: figures[name] for name in wanted}


def _truth(row: Row) -> dict[str, Path]:
    """The truth files of both scans, by the names of the evaluation; also the scans, for their grids, if they are
    files."""
    files = {
        f"{scan}_{name}": row.folder / row.cells[f"{scan}_{kind}"]
        for kind, name in TRUTH.items()
        for scan in SCANS
        if all(f"{other}_{kind}" in row.cells for other in SCANS)
    }
    scans = {scan: row.folder / row.cells[scan] for scan in SCANS}
    return files | {scan: path for scan, path in scans.items() if path.is_file()}


def _ending(path: Path) -> str:
    from imagefiles import ending

    return ending(path) or _points_ending(path)


ONE_BY_ONE: dict[str, Callable[[Row, Path], Figures]] = {
    "check": lambda row, _: check(row),
    "apply": apply,
    "function": function,
    "evaluate": evaluate,
}
"""The steps that process one pair at a time."""
