"""The masked model, which every sliced model is checked against: full size, with the removed units at zero.

Columns and rows of weights, biases, gains and tables that produce or consume a removed unit are zero. Normalizations
take their statistics over the kept units only. A removed expert loses every comparison, so that no token is sent to it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, unused_name
from snpc.ops import CAST, WHERE, lookup
from snpc.passes.propagation import Comparison, LabeledAxis, LabelFlag, RemovedUnits, Trace, affected_statistics
from snpc.passes.slicing.masked_statistics import mask_statistic
from snpc.types import AnyArray, BoolArray


def removed_positions(trace: Trace, removed: RemovedUnits) -> list[tuple[LabeledAxis, BoolArray]]:
    """Every constant axis from which positions are removed, with a mask of these positions."""
    positions = []
    for axis in trace.table.axes:
        mask = removed.removed[removed.unit_of_label[axis.first_label : axis.first_label + axis.size]]
        if mask.any():
            positions.append((axis, mask))
    return positions


def zeroed_positions(trace: Trace, removed: RemovedUnits) -> list[tuple[str, LabeledAxis, BoolArray]]:
    """(name, axis, mask of the positions that become zero) of every constant that is masked."""
    positions = removed_positions(trace, removed)
    return [(str(axis.constant.name), axis, mask) for axis, mask in positions if can_be_zeroed(axis, trace)]


def mask_constants(
    trace: Trace,
    removed: RemovedUnits,
    overrides: Mapping[str, AnyArray] | None = None,
    names: Container[str] | None = None,
) -> dict[str, AnyArray]:
    """Name -> contents with the removed units at zero, of the constants that are masked.

    ``overrides``: contents to start from instead of those in the graph. ``names``: only constants of these names.
    """
    changed: dict[str, AnyArray] = {}
    for name, axis, mask in zeroed_positions(trace, removed):
        if names is not None and name not in names:
            continue
        array = changed.get(name)
        if array is None:
            tensor = axis.constant.const_value
            assert tensor is not None
            array = np.array((overrides or {}).get(name, tensor.numpy()))
        index: list[slice | BoolArray] = [slice(None)] * array.ndim
        index[axis.axis] = mask
        array[tuple(index)] = 0
        changed[name] = array
    return changed


def can_be_zeroed(axis: LabeledAxis, trace: Trace) -> bool:
    """Can the removed positions be set to zero? Not where a consumer divides by them or takes them for a variance."""
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


def mask_model(model: ir.Model, trace: Trace, removed: RemovedUnits) -> ir.Model:
    """A copy of ``model`` with the removed units masked; shapes stay."""
    copy = model.clone()
    nodes = {node.name: node for node in copy.graph}
    for statistic in affected_statistics(trace, removed):
        mask_statistic(copy.graph, nodes[statistic.context.node.name], statistic, trace, removed)
    for comparison in trace.comparisons:
        if removed.affects(comparison.labels):
            lose_comparison(copy.graph, nodes[comparison.node.name], comparison, removed)
    for name, array in mask_constants(trace, removed).items():
        value = copy.graph.initializers[name]
        dtype = value.const_value.dtype if value.const_value is not None else None
        value.const_value = ir.Tensor(array, dtype=dtype, name=name)
    return copy


def lose_comparison(graph: ir.Graph, node: ir.Node, comparison: Comparison, removed: RemovedUnits) -> None:
    """Give ``node`` minus infinity in the place of removed positions, where it compares its first input."""
    goes = ~removed.kept_mask(comparison.labels).reshape(-1, *[1] * (-1 - comparison.axis))
    name = unused_name(f"{node.name}__loses", graph.initializers)
    mask = add_constant(graph, goes, name)
    least = add_constant(graph, np.asarray(-np.inf, np.float32), unused_name(f"{name}_least", graph.initializers))
    cast = make_node(CAST, [least], {"to": int(comparison.dtype)}, name=f"{name}_cast")
    chosen = make_node(WHERE, [mask, cast.outputs[0], node.inputs[0]], name=f"{name}_where")
    node.prepend([cast, chosen])
    node.replace_input_with(0, chosen.outputs[0])
