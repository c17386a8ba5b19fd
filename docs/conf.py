"""The documentation site: ``python check.py --docs`` builds it into ``build/docs``. Warnings are errors."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

project = "snpc"
author = "the snpc authors"
copyright = author
release = installed_version("snpc")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_click",
    "sphinx_copybutton",
]

myst_heading_anchors = 4

smartquotes = False  # they would make one dash of the two of an option
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "snpc"
html_static_path = ["_static"]
html_css_files = ["snpc.css"]
html_theme_options = {"navigation_with_keys": True}

PARAMETER = re.compile(r"(?:(?<=^)|(?<=[.;] ))(?=``[\w.]+``(?:, ``[\w.]+``)*: )")


def to_restructuredtext(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text. Two habits of theirs are markup here: a block that is indented behind an empty line is
    code, and sentences "``parameter``: what it is" are the items of a list."""
    lines[:] = [line for paragraph in paragraphs(lines) for line in [*marked(paragraph), ""]]


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    yield from (list(group) for filled, group in groupby(lines, key=lambda line: bool(line.strip())) if filled)


def marked(paragraph: list[str]) -> list[str]:
    if paragraph[0].startswith("    "):
        return [".. code-block:: python", "", *paragraph]
    sentences = [text.strip() for text in PARAMETER.split(" ".join(paragraph)) if text.strip()]
    if len(sentences) < 2 or any(line.startswith((" ", "-", "*", "|", ".. ")) for line in paragraph):
        return paragraph
    opening = [] if PARAMETER.match(sentences[0]) else [sentences.pop(0), ""]
    return [*opening, *(f"- {sentence}" for sentence in sentences)]


def setup(app: Any) -> None:
    shutil.rmtree(HERE / "api", ignore_errors=True)  # made anew: a page of a name that is gone would stay
    app.connect("autodoc-process-docstring", to_restructuredtext)
