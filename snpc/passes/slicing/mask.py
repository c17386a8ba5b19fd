"""The oracle's other side: the original, at its full size, with the removed units silenced.

What makes a removed unit and what reads it is zero: columns and rows of weights, biases, gains, tables. What takes
statistics over it takes them over the others.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.passes.propagation.labels import LabeledAxis, LabelFlag
from snpc.passes.propagation.removal import RemovedUnits, affected_statistics
from snpc.passes.propagation.state import Trace
from snpc.passes.slicing.masked_statistics import mask_statistic
from snpc.types import AnyArray, BoolArray


def removed_positions(trace: Trace, dead: RemovedUnits) -> list[tuple[LabeledAxis, BoolArray]]:
    """Every constant axis that loses something, with the positions it loses."""
    found = []
    for axis in trace.table.axes:
        gone = dead.removed[dead.unit_of_label[axis.first_label : axis.first_label + axis.size]]
        if gone.any():
            found.append((axis, gone))
    return found


def zeroed_positions(trace: Trace, dead: RemovedUnits) -> list[tuple[str, LabeledAxis, BoolArray]]:
    """Of the constants that must change for the removed units to be silent: name, axis, and where it becomes zero."""
    found = removed_positions(trace, dead)
    return [(str(axis.constant.name), axis, gone) for axis, gone in found if can_be_zeroed(axis, trace)]


def mask_constants(
    trace: Trace, dead: RemovedUnits, held: Mapping[str, AnyArray] | None = None, names: Container[str] | None = None
) -> dict[str, AnyArray]:
    """New contents, by name, of the constants (of ``names``, where given) that must change for the removed units to be
    silent; ``held``: contents of those that are no longer what they are in the graph."""
    changed: dict[str, AnyArray] = {}
    for name, axis, gone in zeroed_positions(trace, dead):
        if names is not None and name not in names:
            continue
        array = changed.get(name)
        if array is None:
            tensor = axis.constant.const_value
            assert tensor is not None
            array = np.array((held or {}).get(name, tensor.numpy()))
        index: list[slice | BoolArray] = [slice(None)] * array.ndim
        index[axis.axis] = gone
        array[tuple(index)] = 0
        changed[name] = array
    return changed


def can_be_zeroed(axis: LabeledAxis, trace: Trace) -> bool:
    """Not where a zero is divided by, or is a variance; what multiplies or adds silences enough."""
    if trace.table.flags[axis.first_label] & (LabelFlag.WEIGHT_INPUT | LabelFlag.PRODUCED):
        return True
    for user, index in axis.constant.uses():
        spec = lookup(user.domain, user.op_type)
        added = spec.kind == "pointwise" and spec.effect in ("add", "scale") and not (spec.divides and index == 1)
        if not (
            added or spec.kind in ("contraction", "movement", "attention") or (spec.kind == "normalize" and index < 3)
        ):
            return False
    return True


def mask_model(model: ir.Model, trace: Trace, dead: RemovedUnits) -> ir.Model:
    """A copy of ``model`` with the removed units silenced; shapes stay."""
    copy = model.clone()
    nodes = {node.name: node for node in copy.graph}
    for statistic in affected_statistics(trace, dead):
        mask_statistic(copy.graph, nodes[statistic.context.node.name], statistic, trace, dead)
    for name, array in mask_constants(trace, dead).items():
        value = copy.graph.initializers[name]
        dtype = value.const_value.dtype if value.const_value is not None else None
        value.const_value = ir.Tensor(array, dtype=dtype, name=name)
    return copy
