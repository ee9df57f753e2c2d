"""Makes a page from a template. All values are treated as text and escaped."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent
SECTION = ("<!-- begin: more -->", "<!-- end: more -->")
"""Marks in the page of a registration; the section that is measured later lies between them."""


def render(template: str, *, scripts: Sequence[str] = (), run_later: Sequence[str] = (), **values: Any) -> str:
    """The text of a page: a whole HTML document.

    ``template`` and ``scripts`` are names in ``templates/`` and ``static/``. The security policy of the page forbids
    loading anything. It allows only its own scripts and those of ``run_later``: texts that a script takes from the page
    itself.
    """
    sources = [static(name) for name in scripts]
    hashes = " ".join(f"'sha256-{_digest(source)}'" for source in (*sources, *run_later)) or "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {hashes}"
    )
    return (
        _environment()
        .get_template(template)
        .render(policy=policy, style=static("style.css"), scripts=sources, **values)
    )


def fragment(template: str, **values: Any) -> Markup:
    """The text of a part of a page, without scripts."""
    return Markup(_environment().get_template(template).render(**values))


def with_section(page: str, section: str) -> str:
    """A page with the section at the place that its template reserves; unchanged if there is no such place."""
    before, begin, rest = page.partition(SECTION[0])
    _, end, after = rest.partition(SECTION[1])
    return f"{before}{begin}{section}{end}{after}" if begin and end else page


@functools.cache
def static(name: str) -> Markup:
    """One of our files in ``static/``, a style or script, as the content of such an element."""
    text = (FOLDER / "static" / name).read_text(encoding="utf-8")
    if "</" in text:
        raise ValueError(f"{name} holds '</', which would end its element")
    return Markup(text)


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment
