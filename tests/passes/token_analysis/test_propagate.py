"""Following tokens costs what the graph has of nodes, not that times its layers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from snpc.passes.analyze import analyze
from snpc.passes.token_analysis import propagate
from snpc.runtime.io.load import load
from tests.models.optimizer_forms import deep_encoder


def visits(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many nodes are visited while the tokens of a model with so many layers are followed."""
    path, visited = folder / f"{layers}.onnx", []
    onnx.save(deep_encoder(layers), path)
    visit = propagate.propagate_token_node

    def counted(context: propagate.TokenNodeContext) -> None:
        visited.append(context.node)
        visit(context)

    with monkeypatch.context() as patch:
        patch.setattr(propagate, "propagate_token_node", counted)
        tokens = analyze(load(path)).tokens
    assert tokens.blocks == layers and len(tokens.points) == layers and all(point.exits for point in tokens.points)
    return len(visited)


def test_layers_that_end_in_the_same_output_are_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (visits(layers, tmp_path, monkeypatch) for layers in (3, 12))
    assert 0 < few <= many < 5 * few
