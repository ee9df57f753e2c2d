"""Finds the displacement field for each ground truth: on grand-challenge.org, and in plain folders.

Every folder in the ground truth is a case with the name of the folder. `ground_truth.py` describes its content.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CaseError, InputError, printable
from .fields import EMPIRE10, TRANSFORMS
from .images import ENDINGS as IMAGES
from .images import is_there

log = logging.getLogger(__name__)

ENDINGS = (*IMAGES, ".npz", *TRANSFORMS)
"""Endings of files that can hold a displacement field."""
SYSTEM = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""Folders that systems create; they are not cases."""
SOCKET = "displacement-field"
"""The platform's name for the output of the algorithm."""
FOLDER = f"images/{SOCKET}"
"""The folder into which the algorithm writes it."""


@dataclass(frozen=True)
class Case:
    """A displacement field and the folder with its ground truth."""

    name: str
    field: Path | None
    """A file; for EMPIRE10 the folder of defX.mhd, defY.mhd and defZ.mhd; None when there is an error."""
    ground_truth: Path
    error: str | None = None
    """The reason why there is no field, in one sentence."""


@dataclass(frozen=True)
class Job:
    """The entry of predictions.json for one run of the algorithm."""

    pk: str
    succeeded: bool
    status: str
    images: dict[str, str]
    """The names of the input images without their endings, by socket."""
    folder: str
    """The folder of the displacement field, below the output of the job."""


def find_cases(predictions: Path, ground_truth: Path) -> list[Case]:
    """The cases of the ground truth, in the order of their names; each with a field, or the reason why it has none.

    ``predictions`` is the platform's /input if it holds predictions.json. Then the field of a job lies at ``<job
    pk>/output/images/displacement-field/*.mha``, and the job belongs to the case whose ``case.json`` names its images,
    ``{"fixed": "a.mha", "moving": "b.mha"}``; without case.json, it belongs to the case that has the name of the fixed
    image, with or without ``_fixed``. Endings are not compared, because the platform converts uploaded images.
    Otherwise the field of a case is ``<case>/images/displacement-field/*``, ``<case>.mha`` (or another of `ENDINGS`),
    Learn2Reg's ``disp_<case>.nii.gz`` or ``.npz``, or EMPIRE10's ``<case>/defX.mhd``. InputError if there are no cases,
    or if none of them has a field.
    """
    folders = _case_folders(ground_truth)
    try:
        if not predictions.is_dir():
            raise InputError(f"{predictions}: there is no such folder, expected one with displacement fields")
        of_jobs = is_there(predictions / "predictions.json")
        fields = (_fields_of_jobs if of_jobs else _fields_in_folders)(predictions, folders)
    except OSError as error:
        raise InputError(f"{predictions}: cannot be listed ({error.strerror}), expected displacement fields") from error
    cases = [_case(folder, field) for folder, field in zip(folders, fields, strict=True)]
    log.info("%d cases in %s", len(cases), printable(str(ground_truth)))
    return cases


def _case(folder: Path, field: Path | CaseError) -> Case:
    name = printable(folder.name)
    if isinstance(field, CaseError):
        return Case(name, None, folder, printable(str(field)))
    return Case(name, field, folder)


def _case_folders(ground_truth: Path) -> list[Path]:
    try:
        folders = sorted(p for p in ground_truth.iterdir() if p.is_dir())
    except OSError as error:
        raise InputError(f"{ground_truth}: cannot be listed ({error.strerror}), expected a folder per case") from error
    left_out = [folder for folder in folders if folder.name.startswith(".") or folder.name in SYSTEM]
    if left_out:
        log.info("no cases: %s", _listing(folder.name for folder in left_out))
    cases = [folder for folder in folders if folder not in left_out]
    if not cases:
        raise InputError(f"{ground_truth}: holds no folders, expected one per case")
    return cases


def images_in(folder: Path) -> list[Path]:
    """Files with one of the endings, without hidden files; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _ending(p.name) and not p.name.startswith(".") and p.is_file())


def _ending(name: str) -> str:
    return next((e for e in ENDINGS if name.lower().endswith(e)), "")


def _stem(name: str) -> str:
    return name[: len(name) - len(_ending(name))]


def _only(found: list[Path] | CaseError, place: str) -> Path | CaseError:
    """The only field, or an error if there is none or more than one."""
    if isinstance(found, CaseError):
        return found
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found) or "no displacement field"
    return CaseError(f"found {names} in {place}, expected exactly one displacement field")


# --- plain folders ---------------------------------------------------------------------------------------------------


def _fields_in_folders(root: Path, folders: list[Path]) -> list[Path | CaseError]:
    files: dict[str, list[Path]] = {}
    for path in images_in(root):
        files.setdefault(_stem(path.name).removeprefix("disp_"), []).append(path)
    names = {folder.name for folder in folders}
    candidates = {name: _fields_in(root / name, files.get(name, [])) for name in names}
    if not any(candidates.values()):
        raise InputError(
            f"{root}: found no displacement field for {_listing(names)}, expected predictions.json, "
            f"<case>/{FOLDER}/*.mha or <case>.mha; it has {_listing(p.name for p in root.iterdir())}"
        )
    others = files.keys() - names
    others |= {p.name for p in root.iterdir() if p.is_dir() and p.name not in names and _fields_in(p)}
    if others:
        log.warning("no ground truth for %s", _listing(others))
    return [_only(candidates[folder.name], f"{root.name}/{folder.name}") for folder in folders]


def _fields_in(folder: Path, beside: Sequence[Path] = ()) -> list[Path] | CaseError:
    """The fields in a case's folder, and those ``beside`` it."""
    try:
        empire10 = [folder] if (folder / EMPIRE10[0]).is_file() else []
        return [*beside, *images_in(folder / FOLDER), *empire10]
    except OSError as error:
        return _unlisted(folder.name, error)


def _unlisted(place: str, error: OSError) -> CaseError:
    return CaseError(f"{place[:100]}: cannot be listed ({error.strerror}), expected one displacement field in it")


def _listing(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(map(printable, names))
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more or "nothing"


# --- grand-challenge.org ---------------------------------------------------------------------------------------------


def _fields_of_jobs(root: Path, folders: list[Path]) -> list[Path | CaseError]:
    file = root / "predictions.json"
    jobs_of: dict[str, list[Job]] = {folder.name: [] for folder in folders}
    images = {folder.name: _expected_images(folder) for folder in folders}
    bad = {name: of for name, of in images.items() if isinstance(of, CaseError)}
    unmatched = []
    for job in _read_jobs(file):
        matches = [name for name in jobs_of if _belongs(job, name, images[name])]
        if len(matches) > 1:
            raise InputError(f"{file}: job {job.pk} belongs to {_listing(matches)} by its images, expected one case")
        if matches:
            jobs_of[matches[0]].append(job)
        else:
            unmatched.append(f"{job.pk} ({', '.join(job.images.values()) or 'no images'})")
    if not any(jobs_of.values()) and not bad:
        raise InputError(f"{file}: has the jobs {_listing(unmatched)}, expected some of the cases {_listing(jobs_of)}")
    if unmatched:
        log.warning("no ground truth for the jobs %s", _listing(unmatched))
    return [bad.get(folder.name) or _field_of_job(root, jobs_of[folder.name]) for folder in folders]


def _field_of_job(root: Path, jobs: list[Job]) -> Path | CaseError:
    if len(jobs) != 1:
        return CaseError(f"predictions.json has {len(jobs)} jobs for this case, expected one")
    job = jobs[0]
    if not job.succeeded:
        return CaseError(f"the algorithm's job has the status {job.status!r}, expected 'Succeeded'")
    place = f"{job.pk}/output/{job.folder}"
    try:
        return _only(images_in(root / place), place)
    except OSError as error:
        return _unlisted(place, error)


def _expected_images(folder: Path) -> dict[str, str] | CaseError | None:
    """The names in case.json without their endings, by socket; None if there is no such file."""
    file = folder / "case.json"
    try:
        if not is_there(file):
            return None
        content = _read_json(file)
    except (OSError, InputError) as error:
        return CaseError(str(error))
    names = {"fixed": "fixed-image", "moving": "moving-image"}
    if not isinstance(content, dict) or not content or not all(isinstance(v, str) for v in content.values()):
        return CaseError(f'{file}: expected image names, as in {{"fixed": "a.mha", "moving": "b.mha"}}')
    return {str(names.get(key, key)): _stem(name) for key, name in content.items()}


def _belongs(job: Job, case: str, expected: dict[str, str] | CaseError | None) -> bool:
    if isinstance(expected, CaseError):
        return False
    if expected is not None:
        return all(job.images.get(socket) == name for socket, name in expected.items())
    fixed = job.images.get("fixed-image")
    return fixed in (case, f"{case}_fixed", f"{case}-fixed")


def _read_jobs(file: Path) -> list[Job]:
    content = _read_json(file)
    if not isinstance(content, list):
        raise InputError(f"{file}: holds a JSON {type(content).__name__}, expected a list of jobs")
    return [_job(file, number, entry) for number, entry in enumerate(content, start=1)]


def _job(file: Path, number: int, entry: Any) -> Job:
    """One entry; the InputError names what is missing."""
    lists = [entry.get("inputs"), entry.get("outputs") or []] if isinstance(entry, dict) else [None]
    if not all(isinstance(part, list) for part in lists):
        raise InputError(f"{file}: entry {number} is no job with a pk and lists of inputs and outputs")
    pk, status = str(entry.get("pk", "")), entry.get("status", "Succeeded")
    images = {
        _socket(item).get("slug", ""): _stem(item["image"]["name"])
        for item in entry["inputs"]
        if isinstance(item, dict) and isinstance(item.get("image"), dict) and isinstance(item["image"].get("name"), str)
    }
    sockets = [_socket(item) for item in entry.get("outputs") or []]
    folder = next((s.get("relative_path", FOLDER) for s in sockets if s.get("slug") == SOCKET), FOLDER)
    for part in (pk, folder):
        if not part or PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
            raise InputError(f"{file}: entry {number} has the path {part!a}, expected one inside {file.parent}")
    return Job(pk, status == "Succeeded", str(status), images, folder)


def _socket(item: Any) -> dict[str, str]:
    """An input's or output's description: `socket`; before December 2025 only `interface`."""
    found = (item.get("socket") or item.get("interface")) if isinstance(item, dict) else None
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not valid JSON") from error
