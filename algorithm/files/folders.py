"""Finding the input files, in the folders of grand-challenge.org or in plain folders."""

import json
from contextlib import suppress
from pathlib import Path, PurePosixPath

from imagefiles import ENDINGS, ending

from ..errors import InputError
from .inputs import PLATFORM_FILE, Inputs

SLUGS = {"fixed": "fixed-image", "moving": "moving-image", "fixed-mask": "fixed-mask", "moving-mask": "moving-mask"}
"""The name that grand-challenge.org uses for each role. Images are required, masks are optional."""
REQUIRED = ("fixed", "moving")


def find_inputs(root: Path) -> Inputs:
    """The input files under ``root``, in the first of these layouts that exists.

    ``inputs.json`` (grand-challenge.org); ``images/fixed/`` or ``images/fixed-image/`` with one image of any name, or
    with the files of one DICOM series, and the same for moving; ``fixed.*`` and ``moving.*``, or folders ``fixed`` and
    ``moving`` of DICOM files. Masks are found in the same way as ``fixed-mask`` and ``moving-mask``, but are always one
    image. InputError when there is no image or more than one for a role, and when a folder cannot be searched. ``root``
    may be a symbolic link.
    """
    try:
        return _find_inputs(root)
    except OSError as error:
        raise _closed(Path(error.filename or root), error) from error


def _closed(path: Path, error: OSError) -> InputError:
    """An error that names the folder on the way to ``path`` that denies access. It does not name ``path``, which may
    not exist."""
    folder = next((p for p in (path, *path.absolute().parents) if _seen(p)), path)
    return InputError(f"{folder}: cannot be searched ({error.strerror}), expected a folder whose files can be read")


def _seen(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def _find_inputs(root: Path) -> Inputs:
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder, expected one with a fixed and a moving image")
    if (root / PLATFORM_FILE).exists():
        found = _from_platform(root)
        return Inputs(found["fixed"], found["moving"], found.get("fixed-mask"), found.get("moving-mask"), True)
    in_folders = {role: _candidates(root / "images" / role, role) for role in SLUGS}
    for role in REQUIRED:
        in_folders[role] += _candidates(root / "images" / SLUGS[role], role)
    by_name = {
        role: [p for p in images_in(root, links=True) if image_name(p).replace("_", "-") == role] for role in SLUGS
    }
    for role in REQUIRED:
        by_name[role] += _dicom(root / role)
    candidates = in_folders if any(in_folders[role] for role in REQUIRED) else by_name
    fixed, moving = (_single(root, role, candidates[role]) for role in REQUIRED)
    fixed_mask, moving_mask = (
        _single(root, role, candidates[role]) if candidates[role] else None for role in ("fixed-mask", "moving-mask")
    )
    return Inputs(fixed, moving, fixed_mask, moving_mask)


def image_name(path: Path) -> str:
    """The file name without its ending: ``case.nii.gz`` gives ``case``. For a folder (DICOM), its name."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name[: len(name) - len(ending(path) or "")]


def _from_platform(root: Path) -> dict[str, Path]:
    """The file of each role named in inputs.json."""
    sockets = _sockets(root / PLATFORM_FILE)
    missing = [SLUGS[role] for role in REQUIRED if SLUGS[role] not in sockets]
    if missing:
        raise InputError(
            f"{root / PLATFORM_FILE}: has the sockets {', '.join(sorted(sockets)) or 'none'}, "
            f"expected also {' and '.join(missing)}"
        )
    found = {}
    for role, slug in SLUGS.items():
        if slug in sockets:
            found[role] = _single(root, role, _candidates(root / sockets[slug], role), sockets[slug])
    return found


def _sockets(file: Path) -> dict[str, str]:
    """The relative_path of each slug. Entries hold the slug under `socket`; before December 2025 only under
    `interface`."""
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}), expected a list of inputs") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not valid JSON, expected a list of inputs") from error
    if not isinstance(entries, list):
        raise InputError(f"{file}: holds a JSON {type(entries).__name__}, expected a list of inputs")
    sockets: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        socket = (entry.get("socket") or entry.get("interface")) if isinstance(entry, dict) else None
        slug, relative = (socket.get("slug"), socket.get("relative_path")) if isinstance(socket, dict) else (None, None)
        if not isinstance(slug, str) or not isinstance(relative, str):
            raise InputError(f"{file}: entry {number} has no socket with slug and relative_path, expected both as text")
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts or "\0" in relative:
            raise InputError(f"{file}: {slug} is at {relative!a}, expected a path inside {file.parent}")
        if slug in sockets:
            raise InputError(f"{file}: has several entries for {slug}, expected one")
        sockets[slug] = relative
    return sockets


def _candidates(folder: Path, role: str) -> list[Path]:
    """The images in the folder; also the folder itself when the role is a scan and it may hold a DICOM series."""
    return images_in(folder, links=True) + (_dicom(folder) if role in REQUIRED else [])


def _dicom(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    from .dicom import holds_dicom  # only here: to load pydicom takes time

    return [folder] if holds_dicom(folder) else []


def images_in(folder: Path, links: bool = False) -> list[Path]:
    """Files in the folder with a supported ending, without hidden files; none when the folder does not exist.

    With ``links``, broken links are included, so that reading them reports the error.
    """
    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [p for p in files if ending(p) and not p.name.startswith(".")]
        return [p for p in images if p.is_file() or (links and _to_nothing(p))]
    except OSError as error:
        raise _closed(folder, error) from error


def _to_nothing(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _single(root: Path, role: str, candidates: list[Path], relative: str | None = None) -> Path:
    """The only candidate. Broken links count only when there is nothing else. InputError that says what was expected
    and found."""
    candidates = [p for p in candidates if not _to_nothing(p)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    places = f"images/{role}/, images/{SLUGS[role]}/ or {role}.*" if role in REQUIRED else f"images/{role}/ or {role}.*"
    found = ", ".join(str(p.relative_to(root)) for p in candidates) if candidates else "no image"
    raise InputError(
        f"{root}: found {found} for {role}, expected exactly one ({', '.join(ENDINGS)}) in {relative or places}; "
        f"the folder has {_listing(root)}"
    )


def _listing(root: Path, limit: int = 8) -> str:
    """The first files under ``root``, not deeper than ``images/<slug>/``."""
    patterns = ("*", "images/*", "images/*/*")
    files = sorted(str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern) if not p.is_dir())
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more if files else "no files"
