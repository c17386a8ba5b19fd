"""Measured numbers on the pages are those of the stored results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "real-models.md").read_text()


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_real_models", ROOT / "benchmarks" / "plot_real_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(plot: ModuleType) -> None:
    results = plot.load_results()
    assert plot.table(results, every=False) in README
    others = (plot.published_table(), plot.alternatives_table(), plot.peer_table())
    for table in (plot.table(results, every=True), *others):
        assert table in PAGE


def test_the_picture_is_that_of_the_results(plot: ModuleType) -> None:
    for theme in plot.THEMES:
        name = f"real-models-{theme}.svg"
        assert (plot.FIGURES / name).read_text() == plot.figure(theme, plot.load_results())
        assert f"docs/_static/{name}" in README


def test_prose_says_what_the_results_say(plot: ModuleType) -> None:
    results = plot.load_results()
    language = results["SmolLM2-135M"]
    [row] = [row for row in language["rows"] if row.get("readme")]
    lost = 100 * (row["quality"] / language["dense"]["quality"] - 1)
    assert f"loses {lost:.0f} % in perplexity for {100 * (1 - row['target']):.0f} % of its operations" in " ".join(
        README.split()
    )
    measured = [row for row in results["ViT-Tiny"]["rows"] if row["way"] == "snpc"]
    batches = [row for row in measured if "speed_up_batch_8" in row]
    assert batches
    assert all(f"{row['speed_up_batch_8']:.2f} x (macs={row['target']})" in PAGE for row in batches)
    best = max(row["quality"] for row in json.loads(plot.ALTERNATIVES.read_text())["torch_pruning"]["rows"])
    assert f"at most {best:.1f} % right" in README
    assert {model["evaluation_samples"] for model in results.values()} <= {int(n) for n in re.findall(r"\d+", PAGE)}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
