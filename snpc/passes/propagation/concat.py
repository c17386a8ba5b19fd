"""Label propagation through Concat: concatenated along the axis, unified on all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops import Labels, collapse_constant_axes
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext


def concat_labels(context: NodeContext, parts: Sequence[LabeledValue], axis: int) -> Factors:
    """Factors of the concatenation of ``parts`` along ``axis``. On all other axes the labels of the parts are
    unified."""
    parts = [c for c in parts if c.shape[axis] > 0]
    along: list[Labels] = []
    across: dict[frozenset[int], Labels] = {}
    patterns = list(dict.fromkeys(varying_axes(f) - {axis} for c in parts for f in c.factors))
    for pattern in patterns:
        factors_by_part = [[f for f in c.factors if varying_axes(f) - {axis} == pattern] for c in parts]
        if any(axis in varying_axes(f) for part_factors in factors_by_part for f in part_factors) or not pattern:
            # a coarser factor (of heads, beside heads x width) covers the finer one already
            finest = [[f for f in c if axis in varying_axes(f)] or c for c in factors_by_part]
            along += [concat_factor(context, parts, finest, axis, pattern)]
            continue
        for operand, part_factors in zip(parts, factors_by_part, strict=True):
            if not part_factors and all(operand.shape[k] > 1 for k in pattern):
                finer = [
                    f for f in operand.factors if varying_axes(f) - {axis} > pattern and axis not in varying_axes(f)
                ]
                for other, other_factors in zip(parts, factors_by_part, strict=True):
                    for labels in other_factors:
                        for fine in finer:
                            context.trace.table.cover(labels, fine, "aligned")
                        if not finer:
                            context.pin(other, labels, f"concatenated with {context.describe_unlabeled(operand)}")
            for labels in part_factors:
                if pattern in across:
                    context.trace.table.unify(across[pattern], labels)
                else:
                    across[pattern] = labels
    return tuple(f for f in (*along, *across.values()) if f.size)


def concat_factor(
    context: NodeContext,
    parts: Sequence[LabeledValue],
    factors_by_part: Sequence[Sequence[Labels]],
    axis: int,
    pattern: frozenset[int],
) -> Labels:
    """One factor of the concatenation: the labels of each part, -1 for parts without any."""
    rows = []
    shape = [
        max((f.shape[k] for part_factors in factors_by_part for f in part_factors), default=1) if k in pattern else 1
        for k in range(len(parts[0].shape))
    ]
    for operand, part_factors in zip(parts, factors_by_part, strict=True):
        target = [*shape]
        target[axis] = operand.shape[axis]
        if not part_factors:
            rows.append(np.full(target, -1, np.int32))
            continue
        for extra in part_factors[1:]:
            context.trace.table.unify(part_factors[0], extra)
        rows.append(np.broadcast_to(part_factors[0], target))
    return collapse_constant_axes(np.concatenate(rows, axis))
