"""Dead-row elimination: a classifier reads one token, so the last layer need not compute the others.

A backward analysis: every use of a value demands all of it, or only some positions of one axis. Where all uses agree,
the producer is computed for these positions only, and the demand passes on to its inputs. It ends where a use demands
everything (keys and values of the last attention); there the positions are gathered. Outputs keep their values exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    GraphPass,
    ShapeFacts,
    add_constant,
    analyzed_selection,
    choose_dim_sizes,
    has_subgraphs,
    make_node,
    opset_version,
    replace_value,
)
from snpc.ops import GATHER, RESHAPE, SHAPE, SLICE, Blocked, Labels, OpCall, OpSpec, letters_of, lookup

MAX_TRACKED_LENGTH = 1 << 24  # longer axes are not tracked position by position


@dataclass(frozen=True)
class Demand:
    """Only ``positions`` (ascending) of ``axis`` are needed. Negative ones are counted from its end."""

    axis: int
    positions: tuple[int, ...]


NodeInput = tuple[ir.Node, int]
Demands = dict[NodeInput, Demand]  # a use that is not listed needs everything


@dataclass
class DemandAnalysis:
    """The state of the backward analysis.

    ``demands``: by use; ``narrowed``: nodes that are computed for the demanded positions of their output only;
    ``seeds``: nodes that select positions, where a demand starts.
    """

    model: ir.Model
    facts: ShapeFacts
    demands: Demands = field(default_factory=dict)
    narrowed: dict[ir.Node, Demand] = field(default_factory=dict)
    seeds: dict[ir.Node, Demand] = field(default_factory=dict)

    def call(self, node: ir.Node) -> OpCall:
        return self.facts.call(node, opset_version(self.model, node.domain))


class EliminateDeadRows(ir.passes.FunctionalPass):
    """Compute only the rows that an output depends on; an unmodified copy where that makes no product smaller.

    ``facts``: shapes and known values of the model, where the caller has them already.
    """

    def __init__(self, facts: ShapeFacts | None = None) -> None:
        self.facts = facts

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        analysis = DemandAnalysis(model, self.facts or choose_dim_sizes(model)[1])
        for node in reversed(list(model.graph)):
            propagate_demand(analysis, node)
        if not any(lookup(node.domain, node.op_type).kind == "contraction" for node in analysis.narrowed):
            return ir.passes.PassResult(model.clone(), False)
        return ir.passes.PassResult(apply_demands(analysis), True)


ELIMINATE_DEAD_ROWS = GraphPass(
    "eliminate-dead-rows",
    "analyze",
    EliminateDeadRows,
    "computes only the rows that an output depends on",
    "before labels are propagated: groups are found in the graph that is written",
)


def propagate_demand(analysis: DemandAnalysis, node: ir.Node) -> None:
    """Pass the demand on the output of ``node`` on to its inputs, or start one there."""
    outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if has_subgraphs(node) or any(analysis.facts.shape.get(v) is None for v in (*outputs, *filter(None, node.inputs))):
        return
    demand = common_demand(analysis, outputs[0]) if len(outputs) == 1 and not turns_selection(node) else None
    upstream = input_demands(analysis, node, demand) if demand is not None else None
    if demand is not None and upstream is not None:
        analysis.narrowed[node] = demand
        analysis.demands |= {(node, index): needed for index, needed in upstream.items()}
        return
    seed = selected_rows(analysis, node)
    if seed is not None:
        analysis.seeds[node] = seed
        analysis.demands[node, 0] = seed


def turns_selection(node: ir.Node) -> bool:
    """Is it the last node of a selection of columns? Nothing is put inside of one."""
    reshape = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    source = reshape.inputs[0] if reshape is not None and reshape.inputs else None
    gather = source.producer() if source is not None else None
    found = analyzed_selection(gather) if gather is not None else None
    return found is not None and found[1] is node.outputs[0]


def common_demand(analysis: DemandAnalysis, value: ir.Value) -> Demand | None:
    """The demand that all uses of a value share, if any. A use that reads only sizes of other axes demands nothing."""
    if value.is_graph_output():
        return None
    demands = {analysis.demands.get((use.node, use.idx)) for use in value.uses() if not is_shape_query(use.node)}
    demand = demands.pop() if len(demands) == 1 else None
    queries = [use.node for use in value.uses() if is_shape_query(use.node)]
    if demand is None or any(may_read_size(analysis, node, demand.axis) for node in queries):
        return None
    return demand


def is_shape_query(node: ir.Node) -> bool:
    return node.op_type == SHAPE and not node.domain and not node.attributes


def may_read_size(analysis: DemandAnalysis, node: ir.Node, axis: int) -> bool:
    """Can the size of ``axis`` be read from the output of this Shape node?"""
    sizes = node.outputs[0]
    if sizes.is_graph_output():
        return True
    picks = [
        source_positions(analysis.call(u.node), 0) if u.idx == 0 and u.node.op_type in (GATHER, SLICE) else None
        for u in sizes.uses()
    ]
    return any(sources is None or axis in np.asarray(sources) for sources in picks)


def selected_rows(analysis: DemandAnalysis, node: ir.Node) -> Demand | None:
    """The positions that a node selects on one axis, where these are at most half of it."""
    if node.op_type not in (GATHER, SLICE) or node.domain:
        return None
    call = analysis.call(node)
    shape = call.shape(0)
    if len(call.out_shapes[0]) > len(shape):
        return None
    for axis, size in enumerate(shape):
        sources = source_positions(call, axis)
        if sources is not None:
            positions = sorted({int(p) for p in sources.reshape(-1)})
            others = [k for k in range(len(shape)) if k != axis]
            if 0 < 2 * len(positions) <= size and all(keeps_positions(call, k) for k in others):
                return Demand(axis, tuple(p - size for p in positions) if counts_from_end(call) else tuple(positions))
    return None


def counts_from_end(call: OpCall) -> bool:
    """Does a Gather or Slice name its positions from the end of the axis, whatever its size is?"""
    first = call.stored_value(1)
    return first is not None and first.size > 0 and bool((first < 0).all())


def keeps_positions(call: OpCall, axis: int) -> bool:
    """Does a movement keep the positions of ``axis``?"""
    sources = source_positions(call, axis)
    return sources is not None and np.array_equal(sources.reshape(-1), np.arange(call.shape(0)[axis]))


def source_positions(call: OpCall, axis: int) -> Labels | None:
    """For each entry of the output of a movement: its position along ``axis`` of the input."""
    spec = lookup("", call.op)
    shape = call.shape(0)
    view = [1] * len(shape)
    view[axis] = shape[axis]
    if spec.move is None or shape[axis] > MAX_TRACKED_LENGTH:
        return None
    try:
        return spec.move(call, np.arange(shape[axis], dtype=np.int32).reshape(view))[0]
    except Blocked:
        return None


def input_demands(analysis: DemandAnalysis, node: ir.Node, demand: Demand) -> Mapping[int, Demand] | None:
    """The demands on the inputs of a node from that on its output; None where it needs all of them."""
    spec = lookup(node.domain, node.op_type)
    call = analysis.call(node)
    rule = {
        "pointwise": demand_pointwise,
        "normalize": demand_normalization,
        "reduce": demand_reduction,
        "contraction": demand_contraction,
        "movement": demand_movement,
    }.get(spec.kind)
    return rule(spec, call, demand) if rule is not None else None


def demand_pointwise(spec: OpSpec, call: OpCall, demand: Demand) -> Mapping[int, Demand]:
    """Operands broadcast from the right."""
    rank = len(call.out_shapes[0])
    demands = {}
    for index in range(len(call.shapes)):
        axis = demand.axis - rank + len(call.shape(index)) if call.has(index) else -1
        if axis >= 0 and call.shape(index)[axis] > 1:
            demands[index] = Demand(axis, demand.positions)
    return demands


def demand_normalization(spec: OpSpec, call: OpCall, demand: Demand) -> Mapping[int, Demand] | None:
    axes = spec.axes(call) if spec.axes is not None else (demand.axis,)
    others = [k for k in range(1, len(call.shapes)) if call.has(k) and k not in spec.per_axis]
    if (
        demand.axis in {axis % len(call.out_shapes[0]) for axis in axes}
        or others
        or call.shape(0) != call.out_shapes[0]
    ):
        return None
    return {0: demand}


def demand_reduction(spec: OpSpec, call: OpCall, demand: Demand) -> Mapping[int, Demand] | None:
    """A mean of each row; reduced axes stay with size 1."""
    kept = len(call.out_shapes[0]) == len(call.shape(0))
    if spec.axes is None or not kept or demand.axis in spec.axes(call):
        return None
    return {0: demand}


def demand_contraction(spec: OpSpec, call: OpCall, demand: Demand) -> Mapping[int, Demand] | None:
    """The axis must be a free one of one operand."""
    if spec.letters is None or spec.has_activation:
        return None
    try:
        letters = letters_of(spec, call)
    except Blocked:
        return None
    letter = letters.out[demand.axis]
    biased = spec.bias_letters is not None and spec.bias is not None and call.has(spec.bias)
    bias = spec.bias_letters(call) if spec.bias_letters is not None and biased else ""
    if letter in letters.windowed or letter in bias or (letter in letters.left) == (letter in letters.right):
        return None
    operand, spelled = (0, letters.left) if letter in letters.left else (1, letters.right)
    axis = spelled.index(letter)
    index = spec.operands[operand]
    if call.shape(index)[axis] != call.out_shapes[0][demand.axis]:
        return None
    return {index: Demand(axis, demand.positions)}


def demand_movement(spec: OpSpec, call: OpCall, demand: Demand) -> Mapping[int, Demand] | None:
    """The input axis that becomes the demanded one unchanged.

    A node whose parameters hold sizes is not narrowed, except a Reshape that merges the axes behind the demanded one.
    """
    if spec.recompute is not None and not merges_trailing_axes(call, demand.axis):
        return None
    size = call.out_shapes[0][demand.axis]
    view = [1] * len(call.out_shapes[0])
    view[demand.axis] = size
    for axis, length in enumerate(call.shape(0)):
        sources = source_positions(call, axis) if length == size else None
        if sources is not None and sources.size == size and (sources == np.arange(size).reshape(view)).all():
            return {0: Demand(axis, demand.positions)}
    return None


def merges_trailing_axes(call: OpCall, axis: int) -> bool:
    before, after = call.shape(0), call.out_shapes[0]
    return call.op == RESHAPE and axis == len(after) - 2 and before[: axis + 1] == after[: axis + 1]


# -- writing ---------------------------------------------------------------------------------------------------------


def apply_demands(analysis: DemandAnalysis) -> ir.Model:
    copy = analysis.model.clone()
    twins = dict(zip(analysis.model.graph, copy.graph, strict=True))
    gathered: dict[tuple[str, Demand], ir.Value] = {}
    for (node, index), demand in analysis.demands.items():
        value = node.inputs[index]
        producer = value.producer() if value is not None else None
        narrow = producer is not None and analysis.narrowed.get(producer) == demand
        twin = twins[node]
        if node in analysis.seeds:
            if narrow:
                rebuild_selection(copy, analysis, node, twin, demand)
        elif not narrow:
            source = twin.inputs[index]
            assert source is not None
            key = (str(source.name), demand)
            if key not in gathered:
                gathered[key] = insert_row_gather(copy, source, demand, twin)
            twin.replace_input_with(index, gathered[key])
    for node in analysis.narrowed:
        rebuild_reshape(copy, analysis, node, twins[node])
        for value in twins[node].outputs:
            value.shape = None
    copy.graph.sort()
    return copy


def insert_row_gather(model: ir.Model, source: ir.Value, demand: Demand, before: ir.Node) -> ir.Value:
    first = f"last{-demand.positions[0]}" if demand.positions[0] < 0 else demand.positions[0]
    name = f"{source.name}__rows_{demand.axis}_{first}_{len(demand.positions)}"
    index = add_constant(model.graph, np.asarray(demand.positions, np.int64), f"{name}_index")
    node = make_node(GATHER, [source, index], {"axis": demand.axis}, name=name)
    node.outputs[0].type = source.type
    before.prepend(node)
    return node.outputs[0]


def rebuild_selection(model: ir.Model, analysis: DemandAnalysis, node: ir.Node, twin: ir.Node, demand: Demand) -> None:
    """The node that started a demand selects from fewer positions now."""
    sources = source_positions(analysis.call(node), demand.axis)
    assert sources is not None
    call = analysis.call(node)
    found = sources.reshape(-1) - (call.shape(0)[demand.axis] if demand.positions[0] < 0 else 0)
    positions = np.searchsorted(demand.positions, found).astype(np.int64)
    scalar = len(call.out_shapes[0]) < len(call.shape(0))
    if not scalar and len(positions) == 1:  # one position, several times
        positions = positions.repeat(call.out_shapes[0][demand.axis])
    index = add_constant(model.graph, positions.reshape(()) if scalar else positions, f"{twin.outputs[0].name}__index")
    new = make_node(GATHER, [twin.inputs[0], index], {"axis": demand.axis}, name=f"{twin.name}__rows")
    twin.prepend(new)
    replace_value(twin.outputs[0], new.outputs[0])
    model.graph.remove(twin, safe=True)


def rebuild_reshape(model: ir.Model, analysis: DemandAnalysis, node: ir.Node, twin: ir.Node) -> None:
    """Let a Reshape copy all axes but the last: right for any number of positions."""
    if node.op_type == RESHAPE and not node.domain:
        rank = len(analysis.call(node).out_shapes[0])
        target = np.asarray([0] * (rank - 1) + [-1], np.int64)
        shape = add_constant(model.graph, target, f"{twin.outputs[0].name}__shape")
        twin.replace_input_with(1, shape)
        twin.attributes.pop("allowzero", None)
