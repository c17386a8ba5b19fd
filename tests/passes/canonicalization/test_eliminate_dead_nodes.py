"""Dead-node elimination."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper, parser

import snpc
from snpc.passes.canonicalization import EliminateDeadNodes
from snpc.runtime.io import save

DECODER = """<ir_version: 10, opset_import: ["" : 23]>
decoder (float[B, T, 16] x, float[B, 2, P, 8] past_key, float[B, 2, P, 8] past_value)
    => (float[B, T, 16] y, float[B, 2, S, 8] present_key, float[B, 2, S, 8] present_value) {
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a, present_key, present_value =
        Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, , past_key, past_value)
    y = MatMul(a, wo)
}"""


def cached_attention() -> onnx.ModelProto:
    model, rng = parser.parse_model(DECODER), np.random.default_rng(0)
    for name in ("wq", "wk", "wv", "wo"):
        weight = rng.standard_normal((16, 16)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.checker.check_model(model)
    return model


def test_caches_come_out_where_they_go_in_though_nothing_reads_them(tmp_path: Path) -> None:
    """onnxruntime refuses such a node without these outputs."""
    model = ir.from_proto(cached_attention())
    del model.graph.outputs[1:]
    EliminateDeadNodes()(model)
    save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    cache = np.zeros((3, 2, 4, 8), np.float32)
    (found,) = session.run(None, {"x": np.ones((3, 5, 16), np.float32), "past_key": cache, "past_value": cache})
    assert found.shape == (3, 5, 16)


def test_such_a_decoder_is_fitted_to_data() -> None:
    rng, empty = np.random.default_rng(0), np.zeros((16, 2, 0, 8), np.float32)
    data = {"x": rng.standard_normal((16, 6, 16)).astype(np.float32), "past_key": empty, "past_value": empty}
    found = snpc.prune(cached_attention(), ratio=0.5, prune_kv_cache=True, calibration=data)
    assert {shape.shape[3] for shape in found.inputs if "past" in shape.name} == {4}
