"""Can a group be cut at all? Blocks that lie in one tensor with others must leave a box behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.labels import LabelPin
from snpc.passes.propagation.removal import NotRectangular, RemovedUnits, slice_shape
from snpc.passes.propagation.state import Trace
from snpc.types import IntArray

ValuesByUnit = Mapping[int, list[ir.Value]]


def values_by_unit(trace: Trace, units: Units) -> ValuesByUnit:
    """The values in which each unit lies, on axes of which more than one varies."""
    found: dict[int, list[ir.Value]] = defaultdict(list)
    for value, carried in trace.values.items():
        held = {
            int(u) for f in carried.factors if f.squeeze().ndim > 1 for u in np.unique(units.unit_of_label[f[f >= 0]])
        }
        for unit in held:
            found[unit].append(value)
    return found


def infeasible_cut_pin(trace: Trace, units: Units, grid: IntArray, lying: ValuesByUnit) -> LabelPin | None:
    """Where removing one unit of every block would leave a tensor that is no box, and that is no movement of a flat
    one that could be taken apart (see ``unpack``)."""
    if grid.shape[1] < 2:
        return None
    gone = np.zeros(trace.table.count, bool)
    gone[grid[:, 0]] = True
    dead = RemovedUnits(units.unit_of_label, units.block_of_unit, gone)
    touched = dict.fromkeys(v for unit in grid[:, 0].tolist() for v in lying.get(unit, ()))
    for value in touched:
        node = value.producer()
        if not is_ragged(trace, value, dead) or (
            node is not None and lookup(node.domain, node.op_type).kind == "movement"
        ):
            continue
        axis = max(k for f in trace.values[value].factors for k, n in enumerate(f.shape) if n > 1)
        operator = f"{node.op_type} {node.name}" if node is not None else "constant"
        reason = f"it lies in {value.name} beside units that are cut apart from it"
        return LabelPin(
            grid.reshape(-1), str(value.name), axis, trace.values[value].shape[axis], reason, operator, "hard"
        )
    return None


def is_ragged(trace: Trace, value: ir.Value, dead: RemovedUnits) -> bool:
    carried = trace.values[value]
    try:
        slice_shape(carried.shape, carried.factors, dead)
    except NotRectangular:
        return True
    return False
