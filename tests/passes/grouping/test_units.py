"""Units, blocks and heads where a norm on each head meets a rotary table that is a product."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from tests.models.exports import export
from tests.oracle import TOLERANCE, analysis_at, cut, feeds_of, prunable, random_cuts, require

FREQUENCIES = "/model/model/rotary_emb/Mul"


def with_product_of_positions_and_frequencies(path: Path) -> onnx.ModelProto:
    """The export with its rotary angles as a MatMul, as older exporters write them."""
    model = onnx.load(path)
    (node,) = [n for n in model.graph.node if n.name == FREQUENCIES]
    (constant,) = [n for n in model.graph.node if n.output[0] == node.input[1]]
    row = numpy_helper.to_array(constant.attribute[0].t).reshape(1, -1).copy()
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(row))
    node.op_type = "MatMul"
    return model


@pytest.mark.parametrize("name", ["qwen3__ts17", "llama__ts17"])
def test_rotary_angles_may_be_a_product(name: str, tmp_path: Path) -> None:
    """The gains of norms on heads and the table are no group of their own, without the weights of queries and keys."""
    require(name)
    analysis = analysis_at(tmp_path / "model.onnx", with_product_of_positions_and_frequencies(export(name)))
    groups = prunable(analysis.groups, "qk", "vo", "ffn")
    assert {g.role for g in groups} == {"qk", "vo", "ffn"}
    assert all(any(site.kind == "produce" and "rotary" not in site.tensor for site in g.sites) for g in groups)
    pair = cut(analysis, random_cuts(groups, 0))
    assert pair.error(feeds_of(name)) < TOLERANCE
