"""Whether a group can be cut at all: every tensor that its blocks share with others must stay rectangular."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import LabelPin, NotRectangular, RemovedUnits, Trace, slice_shape
from snpc.types import IntArray

ValuesByUnit = Mapping[int, list[ir.Value]]


def values_by_unit(trace: Trace, units: Units) -> ValuesByUnit:
    """The values that contain each unit in a factor over more than one axis."""
    values: dict[int, list[ir.Value]] = defaultdict(list)
    for value, labeled_value in trace.values.items():
        units_of_value = {
            int(u)
            for f in labeled_value.factors
            if f.squeeze().ndim > 1
            for u in np.unique(units.unit_of_label[f[f >= 0]])
        }
        for unit in units_of_value:
            values[unit].append(value)
    return values


def infeasible_cut_pin(trace: Trace, units: Units, grid: IntArray, values: ValuesByUnit) -> LabelPin | None:
    """The pin of a group that cannot be cut; None where it can.

    ``grid``: [blocks, size] units. A group cannot be cut if removing one unit of every block leaves a tensor that is
    not rectangular, unless a movement operator produces it: its input can be split per block
    (``slicing.split_packed``).
    """
    if grid.shape[1] < 2:
        return None
    is_removed = np.zeros(trace.table.count, bool)
    is_removed[grid[:, 0]] = True
    removed = RemovedUnits(units.unit_of_label, units.block_of_unit, is_removed)
    touched = dict.fromkeys(v for unit in grid[:, 0].tolist() for v in values.get(unit, ()))
    for value in touched:
        node = value.producer()
        if not is_ragged(trace, value, removed) or (
            node is not None and lookup(node.domain, node.op_type).kind == "movement"
        ):
            continue
        axis = max(k for f in trace.values[value].factors for k, n in enumerate(f.shape) if n > 1)
        operator = f"{node.op_type} {node.name}" if node is not None else "constant"
        reason = f"it shares {value.name} with units that are cut independently, which would not stay rectangular"
        return LabelPin(
            grid.reshape(-1), str(value.name), axis, trace.values[value].shape[axis], reason, operator, "hard"
        )
    return None


def is_ragged(trace: Trace, value: ir.Value, removed: RemovedUnits) -> bool:
    """Whether slicing leaves a tensor that is not rectangular."""
    labeled_value = trace.values[value]
    try:
        slice_shape(labeled_value.shape, labeled_value.factors, removed)
    except NotRectangular:
        return True
    return False
