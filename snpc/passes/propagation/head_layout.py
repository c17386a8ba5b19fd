"""Heads that a fused node splits and merges inside."""

from __future__ import annotations

from snpc.ops.movement import reshape_labels
from snpc.passes.propagation.state import LabeledValue


def split_head_labels(carried: LabeledValue, heads: int) -> LabeledValue:
    """[B,N,H*D] -> [B,H,N,D]; what has four axes already stays."""
    if len(carried.shape) != 3:
        return carried
    batch, length, width = carried.shape
    shape = (batch, length, heads, width // heads)
    factors = tuple(reshape_labels(f, carried.shape, shape).transpose(0, 2, 1, 3) for f in carried.factors)
    return LabeledValue(carried.name, (batch, heads, length, width // heads), factors, carried.constant)


def merge_head_labels(carried: LabeledValue) -> LabeledValue:
    """[B,H,N,D] -> [B,N,H*D]."""
    batch, heads, length, width = carried.shape
    moved, merged = (batch, length, heads, width), (batch, length, heads * width)
    factors = tuple(reshape_labels(f.transpose(0, 2, 1, 3), moved, merged) for f in carried.factors)
    return LabeledValue(carried.name, merged, factors, carried.constant)


def repeat_head_labels(carried: LabeledValue, times: int) -> LabeledValue:
    shape = (carried.shape[0], carried.shape[1] * times, *carried.shape[2:])
    factors = tuple(f.repeat(times, 1) if f.shape[1] > 1 else f for f in carried.factors)
    return LabeledValue(carried.name, shape, factors, carried.constant)
