"""Labels under the head layout changes inside fused nodes: splitting, merging and repeating heads."""

from __future__ import annotations

from snpc.ops import SHAPE_MISMATCH, Blocked, reshape_labels
from snpc.passes.propagation.state import LabeledValue


def split_head_labels(operand: LabeledValue, heads: int) -> LabeledValue:
    """[batch, tokens, heads * width] -> [batch, heads, tokens, width]; an operand of four axes is unchanged."""
    if len(operand.shape) != 3:
        return operand
    batch, length, width = operand.shape
    shape = (batch, length, heads, width // heads)
    factors = tuple(reshape_labels(f, operand.shape, shape).transpose(0, 2, 1, 3) for f in operand.factors)
    return LabeledValue(operand.name, (batch, heads, length, width // heads), factors, operand.constant)


def merge_head_labels(operand: LabeledValue) -> LabeledValue:
    """[batch, heads, tokens, width] -> [batch, tokens, heads * width]. Raises Blocked for other axes."""
    if len(operand.shape) != 4:
        raise Blocked(0, SHAPE_MISMATCH)
    batch, heads, length, width = operand.shape
    moved, merged = (batch, length, heads, width), (batch, length, heads * width)
    factors = tuple(reshape_labels(f.transpose(0, 2, 1, 3), moved, merged) for f in operand.factors)
    return LabeledValue(operand.name, merged, factors, operand.constant)


def repeat_head_labels(operand: LabeledValue, repeats: int) -> LabeledValue:
    """Every key or value head ``repeats`` times, as grouped-query attention reads them."""
    shape = (operand.shape[0], operand.shape[1] * repeats, *operand.shape[2:])
    factors = tuple(f.repeat(repeats, 1) if f.shape[1] > 1 else f for f in operand.factors)
    return LabeledValue(operand.name, shape, factors, operand.constant)
