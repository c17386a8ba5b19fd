"""Values that a graph computes from shapes and constants only: what do they hold?"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import Facts, compute, opset, subgraphs
from snpc.ops import lookup
from snpc.types import AnyArray

LARGEST = 1 << 24


def is_even(model: ir.Model, facts: Facts, value: ir.Value, axes: tuple[int, ...]) -> bool:
    """Does ``value`` hold the same along ``axes``, whatever the inputs of the graph?"""
    known = Facts(dict(facts.shape), dict(facts.dtype), dict(facts.value))
    array = contents(model, known, value)
    if array is None:
        return False
    return all(bool((array == array.take([0], axis)).all()) for axis in axes)


def contents(model: ir.Model, known: Facts, value: ir.Value) -> AnyArray | None:
    """Its elements under the facts' binding; None where they depend on more than shapes. Adds to ``known``."""
    shape = known.shape.get(value)
    if value in known.value:
        return known.value[value]
    if shape is None or int(np.prod(shape, dtype=np.int64)) > LARGEST:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if (
        node is None
        or subgraphs(node)
        or lookup(node.domain, node.op_type).kind in ("contraction", "attention", "opaque")
    ):
        return None
    for source in node.inputs:
        if source is not None and source not in known.value:
            found = contents(model, known, source)
            if found is None:
                return None
            known.value[source] = found
    made = compute(known, node, opset(model, node.domain))
    if made is None:
        return None
    known.value.update(zip(node.outputs, made, strict=False))
    return known.value.get(value)
