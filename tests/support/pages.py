"""How tests read the pages: as text, and in a browser where there is one."""

import html.parser
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    *("--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1000,900"),
)
SECONDS = 120

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self.text += data


def browse(page: Path, folder: Path, *options: str) -> tuple[str, list[str]]:
    """What the page became, and what its scripts said on the console; offline."""
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *options]
    done = subprocess.run([*command, f"file://{page}"], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
