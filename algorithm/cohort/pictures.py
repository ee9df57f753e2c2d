"""Takes the pictures of a pair from its own page, so that both pages show the same."""

from html.parser import HTMLParser
from pathlib import Path

from resultpages.pictures import Picture

from .done import pair_folder


def pictures_of(out: Path, subject: str) -> list[Picture]:
    """The pictures of the first plane on report.html; none without such a page."""
    try:
        text = (pair_folder(out, subject) / "report.html").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = _Pictures()
    found.feed(text)
    return found.pictures


class _Pictures(HTMLParser):
    """Collects the images of the first plane in the sections "pictures" and "field"; their alternative texts become
    captions."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[Picture] = []
        self._section, self._plane = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Counts planes (h3) within sections (h2)."""
        has = dict(attrs)
        if tag == "h2":
            self._section, self._plane = has.get("id") or "", 0
        elif tag == "h3":
            self._plane += 1
        elif tag == "img" and self._plane == 1 and self._section in ("pictures", "field"):
            source, alt = has.get("src") or "", has.get("alt") or ""
            if source.startswith("data:image/"):
                size = int(has.get("width") or 0), int(has.get("height") or 0)
                self.pictures.append(Picture(source, alt, alt, *size))
