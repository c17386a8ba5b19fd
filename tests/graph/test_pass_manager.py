"""Bugs are told from malformed graphs: only what onnx-ir itself refuses is blamed on the model."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import snpc
from snpc.graph.pass_manager import MalformedGraphError, malformed_graph_errors
from snpc.passes.canonicalization.canonicalize import NameNodes
from tests.command_line import write_tiny


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), ir.passes.PreconditionError("no")])
def test_what_onnx_ir_refuses_is_a_malformed_graph(error: Exception) -> None:
    def refused() -> None:
        with malformed_graph_errors():
            raise RuntimeError("Error calling f with: everything") from error

    with pytest.raises(MalformedGraphError, match=r"^the graph is malformed \(no\)$"):
        refused()


@pytest.mark.parametrize("bug", [AttributeError("clone"), ValueError("a bug"), KeyError("a")])
def test_a_bug_of_snpc_keeps_its_traceback(bug: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise bug

    monkeypatch.setattr(NameNodes, "call", broken)
    with pytest.raises(type(bug)):
        snpc.load(write_tiny(tmp_path / "m.onnx"))


def test_a_cycle_is_a_malformed_graph(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].input[0] = "d"
    onnx.save(model, path)
    with pytest.raises(snpc.UserError, match=r"m\.onnx: the graph is malformed \(.*cycle.*\); run onnx\.checker on it"):
        snpc.load(path)
