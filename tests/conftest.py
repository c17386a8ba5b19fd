"""Options of the suite."""

from __future__ import annotations

import os

# Two libraries that each start a thread per core slow each other down many times over; set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/passes/slicing/golden from what comes out now"
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="cut every group of every export alone, not one of each kind"
    )
