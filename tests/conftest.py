"""Options of the suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what comes out now")
    parser.addoption(
        "--exhaustive", action="store_true", help="cut every group of every export alone, not one of each kind"
    )
