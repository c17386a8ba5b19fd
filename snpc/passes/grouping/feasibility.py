"""Whether a group can be cut at all: every tensor that its blocks share with others must stay rectangular."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

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
    goes = np.zeros(trace.table.count, bool)
    goes[grid[:, 0]] = True
    return ragged_pin(trace, units.removal(goes), values_of(grid[:, 0], values), grid.reshape(-1))


def infeasible_heads_pin(
    trace: Trace, units: Units, heads: IntArray, channels: IntArray, values: ValuesByUnit
) -> LabelPin | None:
    """As ``infeasible_cut_pin``, of whole heads. ``channels``: the units that have a part in them."""
    none, goes = np.zeros(trace.table.count, bool), np.zeros(trace.table.count, bool)
    goes[heads[0]] = True
    return ragged_pin(trace, units.removal(none, goes), values_of(channels, values), heads)


def values_of(members: IntArray, values: ValuesByUnit) -> list[ir.Value]:
    """The values that contain one of these units, each once."""
    return list(dict.fromkeys(value for unit in members.tolist() for value in values.get(unit, ())))


def ragged_pin(trace: Trace, removed: RemovedUnits, touched: Sequence[ir.Value], labels: IntArray) -> LabelPin | None:
    """The pin of ``labels`` for the first value that is not rectangular without ``removed``; None where there is none.
    ``touched``: the values that may be it."""
    for value in touched:
        node = value.producer()
        if not is_ragged(trace, value, removed) or (
            node is not None and lookup(node.domain, node.op_type).kind == "movement"
        ):
            continue
        axis = max(k for f in trace.values[value].factors for k, n in enumerate(f.shape) if n > 1)
        operator = f"{node.op_type} {node.name}" if node is not None else "constant"
        reason = f"it shares {value.name} with units that are cut independently, which would not stay rectangular"
        return LabelPin(labels, str(value.name), axis, trace.values[value].shape[axis], reason, operator, "hard")
    return None


def is_ragged(trace: Trace, value: ir.Value, removed: RemovedUnits) -> bool:
    """Whether slicing leaves a tensor that is not rectangular."""
    labeled_value = trace.values[value]
    try:
        slice_shape(labeled_value.shape, labeled_value.factors, removed)
    except NotRectangular:
        return True
    return False
