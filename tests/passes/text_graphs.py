"""Small graphs as ONNX text, with their weights, and what the reference implementation makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]

HEADER = '<ir_version: 8, opset_import: ["": {version}]>'

ATTENTION = """
    attention (float[B, N, 8] x) => (float[B, N, 8] y) {
        q = MatMul(x, wq)
        qb = Add(q, bq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        q4 = Reshape(qb, heads)
        k4 = Reshape(k, heads)
        v4 = Reshape(v, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        s = MatMul(qt, kt)
        SCALED
        p = Softmax <axis = -1> (ss)
        c = MatMul(p, vt)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cf = Reshape(ct, flat)
        y = MatMul(cf, wo)
    }"""


def text_model(text: str, weights: dict[str, Array], version: int = 17) -> onnx.ModelProto:
    """The graph with ``weights`` as initializers."""
    model = onnx.parser.parse_model(HEADER.format(version=version) + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def attention_model(scaled: str, **more: Array) -> onnx.ModelProto:
    """Two heads of width 4. ``scaled``: the node that makes ``ss`` of the scores ``s``."""
    rng = np.random.default_rng(0)
    weights: dict[str, Array] = {
        name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")
    }
    weights["bq"] = rng.standard_normal(8).astype(np.float32)
    weights |= {"heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    return text_model(ATTENTION.replace("SCALED", scaled), weights | more)


def outputs_of(model: onnx.ModelProto | ir.Model, feeds: dict[str, Array]) -> list[Array]:
    """What onnx's reference implementation computes."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return [np.asarray(array) for array in ReferenceEvaluator(proto).run(None, feeds)]


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
