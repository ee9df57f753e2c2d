"""What the documentation repeats of the code, and that its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.quantities import QUANTITIES, Quantity

ROOT = Path(__file__).parent.parent
DEFINITIONS = (ROOT / "docs" / "evaluation.md").read_text()
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "weights" / "README.md"))
QUIET = {"NO_MKDOCS_2_WARNING": "1"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.key)
def test_definitions_of_the_evaluation(quantity: Quantity) -> None:
    definition = quantity.definition.replace("|", "\\|")  # or it would end the cell
    assert f"| `{quantity.key}` | {quantity.title} | {definition} |" in DEFINITIONS.splitlines()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Those within the repository: files are there, and headings."""
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or heading in anchors(target), f"{page.name}: {link}"


def test_the_site_is_built(tmp_path: Path) -> None:
    """Without a warning, which a heading that is not there would be, or a page that nobody finds."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | QUIET, check=False)
    assert built.returncode == 0, built.stderr
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    loaded = [source for page in pages for source in re.findall(r'src="(https?:[^"]*)"', page)]
    assert not loaded, "the site loads something from elsewhere"
