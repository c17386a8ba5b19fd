"""Heads of queries, keys and values become equally wide by zeros; outputs stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.fusion.pad_heads import PadAttentionHeads
from tests.passes.text_graphs import Array, attention_model, op_types, outputs_of, text_model

RNG = np.random.default_rng(1)
X = RNG.standard_normal((2, 3, 8)).astype(np.float32)


def random(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def test_separate_nodes_get_heads_that_a_kernel_takes() -> None:
    proto = attention_model("ss = Mul(s, half)", half=np.array(0.5, np.float32))  # two heads of width 4
    (expected,) = outputs_of(proto, {"x": X})
    result = PadAttentionHeads()(canonicalize(ir.from_proto(proto)))
    assert [op_types(result.model).count(op) for op in ("Pad", "Slice")] == [3, 1]
    np.testing.assert_allclose(outputs_of(result.model, {"x": X})[0], expected, rtol=1e-4, atol=1e-5)
    assert not PadAttentionHeads()(result.model).modified, "heads of 16 are left alone"


@pytest.mark.parametrize(("query", "value", "padded"), [(24, 20, ["v"]), (20, 24, ["q", "k"]), (24, 24, [])])
def test_the_narrower_side_is_padded(query: int, value: int, padded: list[str]) -> None:
    proto = text_model(
        """m (float[B, 2, N, WQ] q, float[B, 2, M, WQ] k, float[B, 2, M, WV] v) => (float[B, N, 2, WV] y) {
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s = MatMul (q, kt)
            p = Softmax <axis = -1> (s)
            c = MatMul (p, v)
            y = Transpose <perm = [0, 2, 1, 3]> (c)
        }""".replace("WQ", str(query)).replace("WV", str(value)),
        {},
    )
    result = PadAttentionHeads()(canonicalize(ir.from_proto(proto)))
    assert op_types(result.model).count("Pad") == len(padded)
    feeds = {"q": random(2, 2, 3, query), "k": random(2, 2, 5, query), "v": random(2, 2, 5, value)}
    np.testing.assert_allclose(outputs_of(result.model, feeds)[0], outputs_of(proto, feeds)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_an_attention_node_gets_values_as_wide_as_its_keys(flat: bool, tmp_path: Path) -> None:
    """Grouped heads: four of queries, two of keys and values; the scale is that of the width before."""
    heads, width, value = (4, 2, 2), 20, 24
    shapes = [
        [2, n, h * w] if flat else [2, h, n, w] for h, n, w in zip(heads, (3, 5, 5), (width, width, value), strict=True)
    ]
    types = ", ".join(f"float{s} {n}".replace("[2,", "[B,") for s, n in zip(shapes, "qkv", strict=True))
    attributes = "<q_num_heads = 4, kv_num_heads = 2>" if flat else ""
    out = [2, 3, 4 * value] if flat else [2, 4, 3, value]
    text = f"m ({types}) => (float{out} y) {{ a = Attention {attributes} (q, k, v) y = Relu (a) }}".replace(
        "float[2,", "float[B,"
    )
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    result = PadAttentionHeads()(canonicalize(ir.from_proto(model)))
    assert op_types(result.model).count("Pad") == 2, "queries and keys"
    feeds = {n: random(*s) for s, n in zip(shapes, "qkv", strict=True)}
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(ir.to_proto(result.model), tmp_path / "b.onnx")
    before, after = (
        onnxruntime.InferenceSession(tmp_path / n, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for n in ("a.onnx", "b.onnx")
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
