"""Side inputs: masks and position tables beside the tokens are gathered as the tokens are, or pin them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from onnx import TensorProto, helper

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, self_deciding_model
from snpc.runtime.io.save import save
from snpc.tokens.reduction import reduce_tokens
from tests.models.rotary_decoders import RotaryDecoder
from tests.oracle import analysis_at
from tests.passes.text_graphs import Array, text_model

# Two attentions over 6 tokens, then a mean. SIDE follows the first one.
GRAPH = """
    g (INPUTS) => (float[B, 4] y) {
        t = MatMul(x, w0)
        q = MatMul(t, wq)  k = MatMul(t, wk)  kt = Transpose <perm = [0, 2, 1]> (k)  s = MatMul(q, kt)
        p = Softmax <axis = -1> (s)  c = MatMul(p, t)  r = Add(t, c)
        q2 = MatMul(r, wq)  k2 = MatMul(r, wk)  kt2 = Transpose <perm = [0, 2, 1]> (k2)  s2 = MatMul(q2, kt2)
        SIDE
        p2 = Softmax <axis = -1> (s3)  c2 = MatMul(p2, r)  r2 = Add(r, c2)
        y = ReduceMean <axes = [1], keepdims = 0> (r2)
    }"""
RNG = np.random.default_rng(0)
WEIGHTS: dict[str, Array] = {n: RNG.standard_normal((4, 4)).astype(np.float32) for n in ("w0", "wq", "wk")}
TABLE = RNG.standard_normal((1, 6, 6)).astype(np.float32)


def analysis_with(side: str, path: Path, inputs: str = "", **constants: Array) -> Analysis:
    text = GRAPH.replace("INPUTS", "float[B, 6, 4] x" + inputs).replace("SIDE", side)
    return analysis_at(path / "model.onnx", text_model(text, WEIGHTS | constants))


def check_reduced(analysis: Analysis, path: Path, **more: Array) -> None:
    """The reduced model equals the original with the same tokens taken out in place (the oracle of token reduction)."""
    reduced = reduce_tokens(analysis, "topk:2@1")
    written = path / "reduced.onnx"
    save(finalize(self_deciding_model(reduced)), written)
    x = np.random.default_rng(1).standard_normal((2, 6, 4)).astype(np.float32)
    check_token_reduction(reduced, written, [{"x": x} | more], 1e-4)


def test_a_stored_table_is_gathered(tmp_path: Path) -> None:
    analysis = analysis_with("s3 = Add(s2, table)", tmp_path, table=TABLE)
    assert analysis.tokens.at(1).side_input == "table"  # type: ignore[union-attr]
    check_reduced(analysis, tmp_path)


def test_a_table_with_equal_entries_is_no_side_input(tmp_path: Path) -> None:
    analysis = analysis_with("s3 = Add(s2, table)", tmp_path, table=np.full((1, 6, 6), 0.5, np.float32))
    assert analysis.tokens.at(1).side_input == ""  # type: ignore[union-attr]
    check_reduced(analysis, tmp_path)


def test_a_mask_that_is_a_graph_input_is_followed(tmp_path: Path) -> None:
    """[batch, tokens], one entry per key: it reaches the scores through Unsqueeze and is gathered at the input."""
    side = "m = Unsqueeze(mask, one)  s3 = Add(s2, m)"
    analysis = analysis_with(side, tmp_path, ", float[B, 6] mask", one=np.array([1]))
    point = analysis.tokens.at(1)
    assert point is not None
    assert {value.name for value in point.flow.origins} == {point.value, "mask"}
    mask = np.where(np.random.default_rng(2).random((2, 6)) < 0.3, -4.0, 0.0).astype(np.float32)
    check_reduced(analysis, tmp_path, mask=mask)


@pytest.mark.parametrize(
    ("side", "inputs", "constants"),
    [
        ("s3 = Add(s2, table)", "", {"table": TABLE[0]}),  # [queries, keys] without a batch axis
        ("s3 = Add(s2, pairs)", ", float[B, 6, 6] pairs", {}),  # two token axes in one input
    ],
)
def test_what_cannot_be_gathered_pins_the_tokens(
    side: str, inputs: str, constants: dict[str, Array], tmp_path: Path
) -> None:
    analysis = analysis_with(side, tmp_path, inputs, **constants)
    assert analysis.tokens.at(1) is None
    name = "table" if constants else "pairs"
    reason = f"tokens are combined with {name}, which has an entry for every pair of positions"
    assert reason in [pin.reason for pin in analysis.tokens.pins]


@pytest.mark.parametrize(("heads_axis", "table"), [(1, "cosine"), (2, "cos")])
def test_a_rotary_table_is_named_as_the_file_names_it(heads_axis: Literal[1, 2], table: str) -> None:
    model = RotaryDecoder(table="stored", heads_axis=heads_axis).model()
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["pooled"], axes=[1], keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None))
    first, _ = snpc.analyze(snpc.load(model)).tokens.points
    assert first.side_input == table
