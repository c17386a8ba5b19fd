"""Benchmarks, examples and scripts use names that snpc and the tests have. Running all of them would take hours."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples", "scripts") for path in (ROOT / folder).glob("*.py"))
OURS = ("snpc", "tests")


def missing_names(source: str) -> Iterator[str]:
    """Imports from snpc or tests, and attributes of a module called ``snpc``, that do not exist."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not has(node.module, alias.name))
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] in OURS]
            yield from (name for name in ours if not is_module(name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "snpc":
            yield from [] if has("snpc", node.attr) else [f"snpc.{node.attr}"]


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def has(module: str, name: str) -> bool:
    return is_module(module) and (hasattr(importlib.import_module(module), name) or is_module(f"{module}.{name}"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_exist(path: Path) -> None:
    assert list(missing_names(path.read_text())) == []


@pytest.mark.parametrize(
    "source", ["from snpc.passes.nowhere import x", "from snpc.types import Nothing", "import snpc\nsnpc.decide()"]
)
def test_a_name_that_is_missing_is_seen(source: str) -> None:
    assert len(list(missing_names(source))) == 1
