"""Golden files: text that a person has read, compared with what comes out now."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest


def check_golden(request: pytest.FixtureRequest, path: Path, text: str) -> None:
    """Compare ``text`` with the file, or write the file where pytest runs with ``--update-golden``."""
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    if not path.exists():
        pytest.fail(f"{path} is missing: pytest --update-golden writes it")
    expected = path.read_text()
    if text != expected:
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=1)
        pytest.fail("\n".join([*diff, "if this is intended: pytest --update-golden, and read the diff"]))
