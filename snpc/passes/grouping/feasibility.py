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
    removed = units.removal(is_removed)
    touched = dict.fromkeys(v for unit in grid[:, 0].tolist() for v in values.get(unit, ()))
    ragged = (value for value in touched if not is_moved(value) and is_ragged(trace, value, removed))
    return next((ragged_pin(trace, value, grid.reshape(-1)) for value in ragged), None)


def infeasible_heads_pin(
    trace: Trace, units: Units, heads: IntArray, channels: IntArray, values: ValuesByUnit
) -> LabelPin | None:
    """The pin of whole heads that cannot go, as removing one leaves a tensor that is not rectangular; None where they
    can. ``channels``: the units that have a part in them."""
    is_removed = np.zeros(trace.table.count, bool)
    is_removed[heads[0]] = True
    removed = units.removal(np.zeros(trace.table.count, bool), is_removed)
    touched = dict.fromkeys(v for unit in channels.tolist() for v in values.get(unit, ()))
    ragged = (value for value in touched if is_ragged(trace, value, removed))
    return next((ragged_pin(trace, value, heads) for value in ragged), None)


def is_moved(value: ir.Value) -> bool:
    """Whether a movement operator produces it."""
    node = value.producer()
    return node is not None and lookup(node.domain, node.op_type).kind == "movement"


def ragged_pin(trace: Trace, value: ir.Value, labels: IntArray) -> LabelPin:
    """The pin of ``labels`` without some of which ``value`` would not be rectangular."""
    labeled, node = trace.values[value], value.producer()
    axis = max(k for f in labeled.factors for k, n in enumerate(f.shape) if n > 1)
    operator = f"{node.op_type} {node.name}" if node is not None else "constant"
    reason = f"it shares {value.name} with units that are cut independently, which would not stay rectangular"
    return LabelPin(labels, str(value.name), axis, labeled.shape[axis], reason, operator, "hard")


def is_ragged(trace: Trace, value: ir.Value, removed: RemovedUnits) -> bool:
    """Whether slicing leaves a tensor that is not rectangular."""
    labeled_value = trace.values[value]
    try:
        slice_shape(labeled_value.shape, labeled_value.factors, removed)
    except NotRectangular:
        return True
    return False
