"""What query, key and value are made of: columns of one product with a constant, as com.microsoft.Attention takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.graph.traversal import is_stored_constant as is_constant
from snpc.ops import lookup
from snpc.ops.names import MATMUL, SPLIT
from snpc.passes.fusion.head_columns import HeadColumns, NotFusable
from snpc.types import AnyArray


@dataclass(frozen=True)
class PackedProjection:
    """``source`` [B, N, D] times ``weight`` [D, columns], plus ``bias`` [columns]."""

    source: ir.Value
    weight: AnyArray
    bias: AnyArray


def pack_projections(places: Sequence[HeadColumns], facts: ShapeFacts) -> PackedProjection:
    """Query, key and value beside each other. Raises Unfit where they are not products of one value."""
    found = [match_projection(place, facts) for place in places]
    if any(one.source is not found[0].source for one in found):
        raise NotFusable("query, key and value are made of different values")
    weight, bias = (np.concatenate([getattr(one, name) for one in found], -1) for name in ("weight", "bias"))
    return PackedProjection(found[0].source, weight, bias)


def match_projection(place: HeadColumns, facts: ShapeFacts) -> PackedProjection:
    whole, before = split_source(place.value, facts)
    value, bias = separate_bias(whole)
    weighted = match_constant_product(value)
    if place.order or weighted is None:
        raise NotFusable("it is not columns of a product with a constant matrix")
    columns = slice(before + place.start, before + place.start + place.columns)
    source, table = weighted[0], constant_contents(weighted[1])
    full = np.zeros(table.shape[1], table.dtype) if bias is None else constant_contents(bias)
    if full.shape != (table.shape[1],):
        raise NotFusable("what is added to the product is no bias")
    return PackedProjection(source, table[:, columns], full[columns])


def split_source(value: ir.Value, facts: ShapeFacts) -> tuple[ir.Value, int]:
    """(what ``value`` is columns of, how many lie before them) where a node divides columns into parts."""
    node = value.producer()
    if node is None or node.op_type != SPLIT or node.inputs[0] is None:
        return value, 0
    shapes = [facts.shape.get(out) or () for out in node.outputs]
    whole = facts.shape.get(node.inputs[0]) or ()
    if any(len(shape) != len(whole) or shape[:-1] != whole[:-1] for shape in shapes):
        return value, 0
    return node.inputs[0], sum(shape[-1] for shape in shapes[: node.outputs.index(value)])


def match_constant_product(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(rows, weight) where ``value`` is rows times a constant matrix."""
    node = value.producer()
    if node is None or node.op_type != MATMUL or node.domain:
        return None
    rows, weight = node.inputs
    if rows is None or weight is None or not is_constant(weight) or weight.const_value is None:
        return None
    return (rows, weight) if len(weight.const_value.shape) == 2 else None


def separate_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(what a constant is added to, the constant)."""
    node = value.producer()
    spec = lookup(node.domain, node.op_type) if node is not None else None
    if node is None or spec is None or spec.kind != "pointwise" or spec.effect != "add" or spec.subtracts:
        return value, None
    constants = [v for v in node.inputs if v is not None and is_constant(v)]
    others = [v for v in node.inputs if v is not None and not is_constant(v)]
    return (others[0], constants[0]) if len(constants) == len(others) == 1 else (value, None)


def constant_contents(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()
