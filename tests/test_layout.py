"""The rooms of `algorithm/`, and that what is imported lies below: nobody has to know what is built on top of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "algorithm"
ORDER = (
    ("__init__", "errors", "hounsfield", "cpus", "evaluating", "loops", "threads"),
    ("report",),
    ("geometry",),
    ("files",),
    ("objective",),
    ("lungs",),
    ("preparation",),
    ("fields",),
    ("cascade",),
    ("refinement",),
    ("devices", "registration"),
    ("results",),
    ("pages",),
    ("function",),
    ("serve",),
    ("options",),
    ("deliver", "given"),
    ("case", "api"),
    ("tools", "radiotherapy"),
    ("cohort",),
    ("command", "__main__"),
)
"""From the ground up. A module imports from its own line and from those above it."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> set[str]:
    """The rooms of all relative imports, those inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level <= len(module.parts) - 1:  # within the room
            continue
        names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        found |= {name if name in LEVEL else "__init__" for name in names}
    return found


def test_every_module_has_its_place() -> None:
    assert {room_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_what_lies_below(module: Path) -> None:
    if module == Path("__init__.py"):
        pytest.skip("the front door of the package: its names are looked up when they are asked for")
    own = room_of(module)
    above = {room for room in imported_rooms(module) - {own} if LEVEL[room] > LEVEL[own]}
    assert not above
