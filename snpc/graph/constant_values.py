"""The contents of values that a graph computes from shapes and constants only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, compute_outputs, has_subgraphs, opset_version
from snpc.ops import lookup
from snpc.types import AnyArray

MAX_FOLDED_ELEMENTS = 1 << 24


def is_constant_along(model: ir.Model, facts: ShapeFacts, value: ir.Value, axes: tuple[int, ...]) -> bool:
    """Is ``value`` constant along ``axes``, for all inputs of the graph?"""
    known = ShapeFacts(dict(facts.shape), dict(facts.dtype), dict(facts.value))
    array = fold_value(model, known, value)
    if array is None:
        return False
    return all(bool((array == array.take([0], axis)).all()) for axis in axes)


def fold_value(model: ir.Model, known: ShapeFacts, value: ir.Value) -> AnyArray | None:
    """Its contents at the sizes of ``known``, to which it adds; None where they depend on more than shapes."""
    shape = known.shape.get(value)
    if value in known.value:
        return known.value[value]
    if shape is None or int(np.prod(shape, dtype=np.int64)) > MAX_FOLDED_ELEMENTS:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if (
        node is None
        or has_subgraphs(node)
        or lookup(node.domain, node.op_type).kind in ("contraction", "attention", "choose", "opaque")
    ):
        return None
    for source in node.inputs:
        if source is not None and source not in known.value:
            contents = fold_value(model, known, source)
            if contents is None:
                return None
            known.value[source] = contents
    outputs = compute_outputs(known, node, opset_version(model, node.domain))
    if outputs is None:
        return None
    known.value.update(zip(node.outputs, outputs, strict=False))
    return known.value.get(value)
