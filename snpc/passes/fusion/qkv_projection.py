"""Matches query, key and value that are columns of products of one value with constants (com.microsoft.Attention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts
from snpc.graph import is_stored_constant as is_constant
from snpc.ops import MATMUL, SPLIT, lookup
from snpc.passes.fusion.head_columns import HeadColumns, NotFusable
from snpc.types import AnyArray


@dataclass(frozen=True)
class PackedProjection:
    """``source`` [B, N, D] times ``weight`` [D, columns], plus ``bias`` [columns]."""

    source: ir.Value
    weight: AnyArray
    bias: AnyArray


def pack_projections(heads: Sequence[HeadColumns], facts: ShapeFacts) -> PackedProjection:
    """The three projections concatenated. Raises NotFusable where they do not read one value."""
    parts = [match_projection(columns, facts) for columns in heads]
    if any(part.source is not parts[0].source for part in parts):
        raise NotFusable("query, key and value are projections of different values")
    weight, bias = (np.concatenate([getattr(part, name) for part in parts], -1) for name in ("weight", "bias"))
    return PackedProjection(parts[0].source, weight, bias)


def match_projection(columns: HeadColumns, facts: ShapeFacts) -> PackedProjection:
    whole, before = split_source(columns.value, facts)
    value, bias = separate_bias(whole)
    product = match_constant_product(value)
    if columns.order or product is None:
        raise NotFusable("it is not columns of a product with a constant matrix")
    start = before + columns.start
    kept = slice(start, start + columns.columns)
    source, weight = product[0], constant_contents(product[1])
    whole_bias = np.zeros(weight.shape[1], weight.dtype) if bias is None else constant_contents(bias)
    if whole_bias.shape != (weight.shape[1],):
        raise NotFusable("the constant that is added to the product is no bias")
    return PackedProjection(source, weight[:, kept], whole_bias[kept])


def split_source(value: ir.Value, facts: ShapeFacts) -> tuple[ir.Value, int]:
    """(the value that a Split takes ``value`` from, how many columns come before); (``value``, 0) without a Split."""
    node = value.producer()
    if node is None or node.op_type != SPLIT or node.inputs[0] is None:
        return value, 0
    shapes = [facts.shape.get(out) or () for out in node.outputs]
    whole = facts.shape.get(node.inputs[0]) or ()
    if any(len(shape) != len(whole) or shape[:-1] != whole[:-1] for shape in shapes):
        return value, 0
    return node.inputs[0], sum(shape[-1] for shape in shapes[: node.outputs.index(value)])


def match_constant_product(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(rows, weight) of a product with a constant matrix; None for any other value."""
    node = value.producer()
    if node is None or node.op_type != MATMUL or node.domain:
        return None
    rows, weight = node.inputs
    if rows is None or weight is None or not is_constant(weight) or weight.const_value is None:
        return None
    return (rows, weight) if len(weight.const_value.shape) == 2 else None


def separate_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(summand, constant) of a sum with a constant; (``value``, None) for any other value."""
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
