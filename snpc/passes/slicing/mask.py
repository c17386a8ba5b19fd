"""The masked model, which every sliced model is checked against: full size, with the removed units at zero.

Columns and rows of weights, biases, gains and tables that produce or consume a removed unit are zero. Normalizations
take their statistics over the kept units only. A removed expert loses every comparison, so that no token is sent to it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, static_shape, unused_name
from snpc.ops import CAST, WHERE, lookup
from snpc.passes.propagation import LabeledAxis, LabelFlag, RemovedUnits, RoutingComparison, Trace, affected_statistics
from snpc.passes.slicing.masked_statistics import mask_statistic
from snpc.types import AnyArray, BoolArray


def removed_positions(trace: Trace, removed: RemovedUnits) -> list[tuple[LabeledAxis, BoolArray]]:
    """Every constant axis from which positions are removed, with a mask of these positions."""
    positions = []
    for axis in trace.table.axes:
        mask = removed.removed[axis.first_label : axis.first_label + axis.size]
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
    for name, positions in zeroed_by_constant(trace, removed).items():
        if names is None or name in names:
            tensor = positions[0][0].constant.const_value
            assert tensor is not None
            changed[name] = zero_positions((overrides or {}).get(name, tensor.numpy()), positions)
    return changed


def zeroed_by_constant(trace: Trace, removed: RemovedUnits) -> dict[str, list[tuple[LabeledAxis, BoolArray]]]:
    """``zeroed_positions`` by name of the constant."""
    found: dict[str, list[tuple[LabeledAxis, BoolArray]]] = {}
    for name, axis, mask in zeroed_positions(trace, removed):
        found.setdefault(name, []).append((axis, mask))
    return found


def zero_positions(contents: AnyArray, positions: Sequence[tuple[LabeledAxis, BoolArray]]) -> AnyArray:
    """A copy with zeros at these positions."""
    array = np.array(contents)
    for axis, mask in positions:
        index: list[slice | BoolArray] = [slice(None)] * array.ndim
        index[axis.axis] = mask
        array[tuple(index)] = 0
    return array


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


def mask_model(
    model: ir.Model, trace: Trace, removed: RemovedUnits, contents: Mapping[str, ir.TensorProtocol] | None = None
) -> ir.Model:
    """A copy of ``model`` with the removed units masked; shapes stay. Masked weights are made when they are read, since
    all of them may not fit into memory. ``contents``: of constants, in place of their own."""
    copy = model.clone()
    nodes = {node.name: node for node in copy.graph}
    # A value that several weights make has a statistic for each; what stays of the value is taken once.
    statistics = {(found.context.node, found.axes): found for found in affected_statistics(trace, removed)}
    for statistic in statistics.values():
        mask_statistic(copy.graph, nodes[statistic.context.node.name], statistic, trace, removed)
    for comparison in trace.comparisons:
        if removed.affects(comparison.labels):
            lose_comparison(copy.graph, nodes[comparison.node.name], comparison, removed)
    for name, tensor in (contents or {}).items():
        copy.graph.initializers[name].const_value = tensor
    for name, positions in zeroed_by_constant(trace, removed).items():
        whole = copy.graph.initializers[name].const_value
        assert whole is not None
        copy.graph.initializers[name].const_value = lazy_mask(whole, positions, name)
    return copy


def lazy_mask(
    tensor: ir.TensorProtocol, positions: Sequence[tuple[LabeledAxis, BoolArray]], name: str
) -> ir.LazyTensor:
    """``tensor`` with zeros at these positions."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(zero_positions(tensor.numpy(), positions), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(static_shape(tensor)), name=name)


def lose_comparison(graph: ir.Graph, node: ir.Node, comparison: RoutingComparison, removed: RemovedUnits) -> None:
    """Give ``node`` minus infinity in the place of removed positions, where it compares an input."""
    goes = ~removed.kept_mask(comparison.labels).reshape(-1, *[1] * (-1 - comparison.axis))
    name = unused_name(f"{node.name}__loses", graph.initializers)
    mask = add_constant(graph, goes, name)
    least = add_constant(graph, np.asarray(-np.inf, np.float32), unused_name(f"{name}_least", graph.initializers))
    cast = make_node(CAST, [least], {"to": int(comparison.dtype)}, name=f"{name}_cast")
    chosen = make_node(WHERE, [mask, cast.outputs[0], node.inputs[comparison.operand]], name=f"{name}_where")
    node.prepend([cast, chosen])
    node.replace_input_with(comparison.operand, chosen.outputs[0])
