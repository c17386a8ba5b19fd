"""What query, key and value are made of: columns of one product with a constant, as com.microsoft.Attention takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.ops.writing import MATMUL
from snpc.passes.fold import v_is_constant as is_constant
from snpc.passes.positions import Place, Unfit
from snpc.types import AnyArray


@dataclass(frozen=True)
class Projection:
    """``source`` [B, N, D] times ``weight`` [D, columns], plus ``bias`` [columns]."""

    source: ir.Value
    weight: AnyArray
    bias: AnyArray


def packed_projection(places: Sequence[Place]) -> Projection:
    """Query, key and value beside each other. Raises Unfit where they are not products of one value."""
    found = [projection(place) for place in places]
    if any(one.source is not found[0].source for one in found):
        raise Unfit("query, key and value are made of different values")
    weight, bias = (np.concatenate([getattr(one, name) for one in found], -1) for name in ("weight", "bias"))
    return Projection(found[0].source, weight, bias)


def projection(place: Place) -> Projection:
    value, bias = unbiased(place.value)
    node = value.producer()
    if place.order or node is None or node.op_type != MATMUL or node.domain not in ("", "ai.onnx"):
        raise Unfit("it is not columns of a product")
    source, weight = node.inputs
    if source is None or weight is None or not is_constant(weight):
        raise Unfit("it is not a product with a constant")
    columns = slice(place.start, place.start + place.columns)
    table = array_of(weight)
    if table.ndim != 2:
        raise Unfit("the constant is no matrix")
    full = np.zeros(table.shape[1], table.dtype) if bias is None else array_of(bias)
    if full.shape != (table.shape[1],):
        raise Unfit("what is added to the product is no bias")
    return Projection(source, table[:, columns], full[columns])


def unbiased(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(what a constant is added to, the constant)."""
    node = value.producer()
    spec = lookup(node.domain, node.op_type) if node is not None else None
    if node is None or spec is None or spec.kind != "pointwise" or spec.effect != "add" or spec.subtracts:
        return value, None
    constants = [v for v in node.inputs if v is not None and is_constant(v)]
    others = [v for v in node.inputs if v is not None and not is_constant(v)]
    return (others[0], constants[0]) if len(constants) == len(others) == 1 else (value, None)


def array_of(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()
