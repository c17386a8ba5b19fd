"""Tensors laid end to end: along the axis labels follow each other, on the others what meets is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.movement import collapse_constant_axes
from snpc.ops.spec import Labels
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext


def concat_labels(here: NodeContext, parts: Sequence[LabeledValue], axis: int) -> Factors:
    """Factors of ``parts`` laid end to end along ``axis``. On other axes the parts must agree, so what meets there is
    joined."""
    parts = [c for c in parts if c.shape[axis] > 0]
    along: list[Labels] = []
    across: dict[frozenset[int], Labels] = {}
    patterns = list(dict.fromkeys(varying_axes(f) - {axis} for c in parts for f in c.factors))
    for pattern in patterns:
        mine = [[f for f in c.factors if varying_axes(f) - {axis} == pattern] for c in parts]
        if any(axis in varying_axes(f) for fs in mine for f in fs) or not pattern:
            along += [concat_factor(here, parts, mine, axis, pattern)]
            continue
        for carried, fs in zip(parts, mine, strict=True):
            if not fs and all(carried.shape[k] > 1 for k in pattern):
                finer = [
                    f for f in carried.factors if varying_axes(f) - {axis} > pattern and axis not in varying_axes(f)
                ]
                for other, gs in zip(parts, mine, strict=True):
                    for labels in gs:
                        for fine in finer:
                            here.trace.table.cover(labels, fine, "meet")
                        if not finer:
                            here.pin(other, labels, f"it is laid beside {here.describe_unlabeled(carried)}")
            for labels in fs:
                if pattern in across:
                    here.trace.table.unify(across[pattern], labels)
                else:
                    across[pattern] = labels
    return tuple(f for f in (*along, *across.values()) if f.size)


def concat_factor(
    here: NodeContext,
    parts: Sequence[LabeledValue],
    mine: Sequence[Sequence[Labels]],
    axis: int,
    pattern: frozenset[int],
) -> Labels:
    rows = []
    shape = [
        max((f.shape[k] for fs in mine for f in fs), default=1) if k in pattern else 1
        for k in range(len(parts[0].shape))
    ]
    for carried, fs in zip(parts, mine, strict=True):
        target = [*shape]
        target[axis] = carried.shape[axis]
        if not fs:
            rows.append(np.full(target, -1, np.int32))
            continue
        for extra in fs[1:]:
            here.trace.table.unify(fs[0], extra)
        rows.append(np.broadcast_to(fs[0], target))
    return collapse_constant_axes(np.concatenate(rows, axis))
