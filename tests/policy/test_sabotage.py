"""A rewrite that goes wrong is never written: each test breaks one step on the way, and nothing but a refusal comes.

What the refusal must name is the node (where a shape gives it away) or the output (where only the numbers do).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.passes.slicing import rewrite, slice
from snpc.passes.slicing.attention_scale import ScalePlan
from tests.command_line import VIT, invoke

Patch = pytest.MonkeyPatch


def refused(folder: Path, words: str) -> None:
    """Exit code 1, a last line that says where, and no file."""
    result = invoke("prune", VIT, "--ratio", 0.5, "-o", folder / "out.onnx", "--method", "select", "--criterion",
                    "magnitude", code=1)  # fmt: skip
    *before, last = result.stderr.splitlines()
    assert all(line.startswith(("snpc: note:", "snpc: warning:", "snpc: plan:")) for line in before)
    assert words in last
    assert list(folder.iterdir()) == []


def after(monkeypatch: Patch, change: Callable[[ir.Model], None]) -> None:
    """Let the rewrite end well, then change what it made."""
    right = rewrite.slice_model

    def wrong(*arguments: Any) -> Any:
        sliced = right(*arguments)
        change(sliced.model)
        return sliced

    monkeypatch.setattr(rewrite, "slice_model", wrong)


def constant(array: np.ndarray[Any, Any], like: ir.Value) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(array), name=like.name)


def test_other_rows_than_planned(tmp_path: Path, monkeypatch: Patch) -> None:
    """Shapes are right, numbers are not: the second layer's weight keeps its first rows."""

    def change(model: ir.Model) -> None:
        value = next(v for n, v in model.graph.initializers.items() if "mlp.fc2.weight" in n or n.endswith("fc2.bias"))
        value.const_value = constant(np.roll(value.const_value.numpy(), 1, 0), value)  # type: ignore[union-attr]

    after(monkeypatch, change)
    refused(tmp_path, "differs from its masked original")


def test_a_weight_that_was_not_cut(tmp_path: Path, monkeypatch: Patch) -> None:
    right = slice.slice_constant

    def lazy(value: ir.Value, *rest: Any) -> None:
        if "blocks.1.mlp.fc1.bias" not in str(value.name):
            right(value, *rest)

    monkeypatch.setattr(slice, "slice_constant", lazy)
    refused(tmp_path, "blocks.1/mlp/fc1")


def test_a_reshape_that_keeps_its_old_target(tmp_path: Path, monkeypatch: Patch) -> None:
    """Repairs do nothing: the shapes that come out are compared with what must come out."""
    monkeypatch.setattr(slice.ShapeParameterEditor, "set_input", lambda *_: None)
    refused(tmp_path, "Reshape")


def test_repairs_that_are_never_tried(tmp_path: Path, monkeypatch: Patch) -> None:
    """And were that check gone too, strict shape inference or the run would refuse the file."""
    monkeypatch.setattr(slice.ShapeParameterEditor, "set_input", lambda *_: None)
    monkeypatch.setattr(slice, "check_movement", lambda *_: None)
    monkeypatch.setattr(slice, "check_output_shapes", lambda *_: None)
    result = invoke("prune", VIT, "--ratio", 0.5, "-o", tmp_path / "out.onnx", "--criterion", "magnitude", code=None)
    assert result.exit_code in (1, 2)
    assert "eshape" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_is_forgotten(tmp_path: Path, monkeypatch: Patch) -> None:
    """No shape shows it: only the softmax's temperature is another."""
    monkeypatch.setattr(rewrite, "plan_scales", lambda *_: ScalePlan(multiply=scaled_queries()))
    refused(tmp_path, "differs from its masked original")


def scaled_queries() -> dict[tuple[str, int], np.ndarray[Any, Any]]:
    import snpc

    analysis = snpc.analyze(snpc.load(VIT))
    group = next(g for g in analysis.groups if g.role == "qk")
    site = next(s for s in group.sites if s.kind == "produce")
    return {(site.tensor, site.axis): np.where(site.units >= 0, 1.5, 1.0)}


def test_a_node_that_is_lost(tmp_path: Path, monkeypatch: Patch) -> None:
    def change(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type in ("Erf", "Relu", "Gelu"))
        node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]

    after(monkeypatch, change)
    refused(tmp_path, "differs from its masked original")


def test_a_node_that_reads_something_else(tmp_path: Path, monkeypatch: Patch) -> None:
    """A weight of the wrong layer, of another width: strict shape inference names the node."""

    def change(model: ir.Model) -> None:
        products = [
            n for n in model.graph if n.op_type == "MatMul" and n.inputs[1] in model.graph.initializers.values()
        ]
        products[1].replace_input_with(1, products[3].inputs[1])
        lost[0] = str(products[1].name)

    lost = [""]
    after(monkeypatch, change)
    result = invoke("prune", VIT, "--ratio", 0.5, "-o", tmp_path / "out.onnx", "--criterion", "magnitude", code=1)
    assert lost[0] in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_original_that_does_not_run(tmp_path: Path) -> None:
    """It loads, but fails on inputs of any size: without a comparison nothing is written."""
    text = """<ir_version: 8, opset_import: ["" : 17]> f (float[N, 8] x) => (float[M, 8] y) <int64[2] odd = {3, 11}>
              { h = MatMul(x, w1) r = Relu(h) o = MatMul(r, w2) c = Reshape(o, odd) y = MatMul(c, w3) }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 30)), ("w2", (30, 8)), ("w3", (11, 8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype("f4"), name))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    result = invoke("prune", path, "--ratio", 0.5, code=2)
    assert "the original does not run, so nothing can be verified" in result.stderr
    assert "or inputs with --calib DATA" in result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_of_another_name(tmp_path: Path, monkeypatch: Patch) -> None:
    after(monkeypatch, lambda model: setattr(model.graph.outputs[0], "name", "other"))
    refused(tmp_path, "its outputs are not the original's")


def test_numbers_that_are_none(tmp_path: Path, monkeypatch: Patch) -> None:
    def change(model: ir.Model) -> None:
        value = next(v for n, v in model.graph.initializers.items() if n.endswith("fc2.bias"))
        value.const_value = constant(value.const_value.numpy() * np.nan, value)  # type: ignore[union-attr]

    after(monkeypatch, change)
    refused(tmp_path, "holds NaN")
