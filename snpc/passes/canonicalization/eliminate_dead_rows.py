"""Rows that no output depends on: a classifier reads one token, so the last layer need not compute the others.

Backwards through the graph, every use of a value either needs all of it or only some positions of one axis. Where all
uses agree, what makes the value is computed for these positions only, and the demand passes on to what it reads. It
ends where somebody needs everything (the keys and values of the last attention, say); there the positions are
gathered. The outputs are the same numbers; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph.builder import add_constant, make_node, replace_value
from snpc.graph.pass_manager import GraphPass
from snpc.graph.shapes import ShapeFacts, choose_dim_sizes, has_subgraphs, opset_version
from snpc.ops import lookup
from snpc.ops.contraction import letters_of
from snpc.ops.names import GATHER, RESHAPE, SHAPE, SLICE
from snpc.ops.spec import Blocked, Labels, OpCall, OpSpec

MAX_TRACKED_LENGTH = 1 << 24  # entries of an axis that are looked at one by one


@dataclass(frozen=True)
class Demand:
    """Only ``positions`` (ascending) of ``axis`` are needed."""

    axis: int
    positions: tuple[int, ...]


NodeInput = tuple[ir.Node, int]
Demands = dict[NodeInput, Demand]  # a use that is not listed needs everything


@dataclass
class DemandAnalysis:
    """Demands by use, and the nodes that can be computed for some positions only (with the demand on their output)."""

    model: ir.Model
    facts: ShapeFacts
    demands: Demands = field(default_factory=dict)
    narrowed: dict[ir.Node, Demand] = field(default_factory=dict)
    seeds: dict[ir.Node, Demand] = field(default_factory=dict)

    def call(self, node: ir.Node) -> OpCall:
        return self.facts.call(node, opset_version(self.model, node.domain))


class EliminateDeadRows(ir.passes.FunctionalPass):
    """Compute only the rows that an output depends on. A copy that is not modified where that spares no product.

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


def propagate_demand(search: DemandAnalysis, node: ir.Node) -> None:
    """Pass the demand on a node's output on to what it reads, or start one."""
    outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if has_subgraphs(node) or any(search.facts.shape.get(v) is None for v in (*outputs, *filter(None, node.inputs))):
        return
    wanted = common_demand(search, outputs[0]) if len(outputs) == 1 else None
    passed = input_demands(search, node, wanted) if wanted is not None else None
    if wanted is not None and passed is not None:
        search.narrowed[node] = wanted
        search.demands |= {(node, index): demand for index, demand in passed.items()}
        return
    start = selected_rows(search, node)
    if start is not None:
        search.seeds[node] = start
        search.demands[node, 0] = start


def common_demand(search: DemandAnalysis, value: ir.Value) -> Demand | None:
    """What every use of a value asks for, where they agree. Who asks for the sizes of other axes asks for no rows."""
    if value.is_graph_output():
        return None
    found = {search.demands.get((use.node, use.idx)) for use in value.uses() if not is_shape_query(use.node)}
    wanted = found.pop() if len(found) == 1 else None
    asking = [use.node for use in value.uses() if is_shape_query(use.node)]
    return (
        wanted if wanted is not None and not any(may_read_size(search, node, wanted.axis) for node in asking) else None
    )


def is_shape_query(node: ir.Node) -> bool:
    return node.op_type == SHAPE and not node.domain and not node.attributes


def may_read_size(search: DemandAnalysis, node: ir.Node, axis: int) -> bool:
    """Does anybody read the size of ``axis`` from what this node gives, or may they?"""
    sizes = node.outputs[0]
    if sizes.is_graph_output():
        return True
    picks = [
        source_positions(search.call(u.node), 0) if u.idx == 0 and u.node.op_type in (GATHER, SLICE) else None
        for u in sizes.uses()
    ]
    return any(picked is None or axis in np.asarray(picked) for picked in picks)


def selected_rows(search: DemandAnalysis, node: ir.Node) -> Demand | None:
    """The positions that a node picks out of one axis, where they are less than half of it."""
    if node.op_type not in (GATHER, SLICE) or node.domain:
        return None
    call = search.call(node)
    shape = call.shape(0)
    if len(call.out_shapes[0]) > len(shape):
        return None
    for axis, size in enumerate(shape):
        picked = source_positions(call, axis)
        if picked is not None:
            positions = sorted({int(p) for p in picked.reshape(-1)})
            others = [k for k in range(len(shape)) if k != axis]
            if 0 < 2 * len(positions) <= size and all(keeps_positions(call, k) for k in others):
                return Demand(axis, tuple(positions))
    return None


def keeps_positions(call: OpCall, axis: int) -> bool:
    """A movement leaves the positions of ``axis`` as they are."""
    picked = source_positions(call, axis)
    return picked is not None and np.array_equal(picked.reshape(-1), np.arange(call.shape(0)[axis]))


def source_positions(call: OpCall, axis: int) -> Labels | None:
    """Where each entry of the output comes from along ``axis`` of the input of a movement."""
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


def input_demands(search: DemandAnalysis, node: ir.Node, wanted: Demand) -> Mapping[int, Demand] | None:
    """What a node needs of its inputs to give these positions of its output; None where it needs everything."""
    spec = lookup(node.domain, node.op_type)
    call = search.call(node)
    rule = {
        "pointwise": demand_pointwise,
        "normalize": demand_normalization,
        "contraction": demand_contraction,
        "movement": demand_movement,
    }.get(spec.kind)
    return rule(spec, call, wanted) if rule is not None else None


def demand_pointwise(spec: OpSpec, call: OpCall, wanted: Demand) -> Mapping[int, Demand]:
    """Operands broadcast from the right."""
    rank = len(call.out_shapes[0])
    found = {}
    for index in range(len(call.shapes)):
        axis = wanted.axis - rank + len(call.shape(index)) if call.has(index) else -1
        if axis >= 0 and call.shape(index)[axis] > 1:
            found[index] = Demand(axis, wanted.positions)
    return found


def demand_normalization(spec: OpSpec, call: OpCall, wanted: Demand) -> Mapping[int, Demand] | None:
    axes = spec.axes(call) if spec.axes is not None else (wanted.axis,)
    others = [k for k in range(1, len(call.shapes)) if call.has(k) and k not in spec.per_axis]
    if (
        wanted.axis in {axis % len(call.out_shapes[0]) for axis in axes}
        or others
        or call.shape(0) != call.out_shapes[0]
    ):
        return None
    return {0: wanted}


def demand_contraction(spec: OpSpec, call: OpCall, wanted: Demand) -> Mapping[int, Demand] | None:
    """The axis must be a free one of one operand."""
    if spec.letters is None or spec.has_activation:
        return None
    try:
        letters = letters_of(spec, call)
    except Blocked:
        return None
    letter = letters.out[wanted.axis]
    biased = spec.bias_letters is not None and spec.bias is not None and call.has(spec.bias)
    bias = spec.bias_letters(call) if spec.bias_letters is not None and biased else ""
    if letter in letters.windowed or letter in bias or (letter in letters.left) == (letter in letters.right):
        return None
    operand, spelled = (0, letters.left) if letter in letters.left else (1, letters.right)
    axis = spelled.index(letter)
    index = spec.operands[operand]
    if call.shape(index)[axis] != call.out_shapes[0][wanted.axis]:
        return None
    return {index: Demand(axis, wanted.positions)}


def demand_movement(spec: OpSpec, call: OpCall, wanted: Demand) -> Mapping[int, Demand] | None:
    """The axis of the input that becomes this one as it is. What has sizes in its parameters is left alone, but for a
    reshape that merges all that lies behind the axis."""
    if spec.recompute is not None and not merges_trailing_axes(call, wanted.axis):
        return None
    size = call.out_shapes[0][wanted.axis]
    view = [1] * len(call.out_shapes[0])
    view[wanted.axis] = size
    for axis, length in enumerate(call.shape(0)):
        picked = source_positions(call, axis) if length == size else None
        if picked is not None and picked.size == size and (picked == np.arange(size).reshape(view)).all():
            return {0: Demand(axis, wanted.positions)}
    return None


def merges_trailing_axes(call: OpCall, axis: int) -> bool:
    before, after = call.shape(0), call.out_shapes[0]
    return call.op == RESHAPE and axis == len(after) - 2 and before[: axis + 1] == after[: axis + 1]


# -- writing ---------------------------------------------------------------------------------------------------------


def apply_demands(search: DemandAnalysis) -> ir.Model:
    copy = search.model.clone()
    twins = dict(zip(search.model.graph, copy.graph, strict=True))
    gathered: dict[tuple[str, Demand], ir.Value] = {}
    for (node, index), demand in search.demands.items():
        value = node.inputs[index]
        producer = value.producer() if value is not None else None
        narrow = producer is not None and search.narrowed.get(producer) == demand
        twin = twins[node]
        if node in search.seeds:
            if narrow:
                rebuild_selection(copy, search, node, twin, demand)
        elif not narrow:
            source = twin.inputs[index]
            assert source is not None
            key = (str(source.name), demand)
            if key not in gathered:
                gathered[key] = insert_row_gather(copy, source, demand, twin)
            twin.replace_input_with(index, gathered[key])
    for node in search.narrowed:
        rebuild_reshape(copy, search, node, twins[node])
        for value in twins[node].outputs:
            value.shape = None
    copy.graph.sort()
    return copy


def insert_row_gather(model: ir.Model, source: ir.Value, demand: Demand, before: ir.Node) -> ir.Value:
    name = f"{source.name}__rows_{demand.axis}_{demand.positions[0]}_{len(demand.positions)}"
    index = add_constant(model.graph, np.asarray(demand.positions, np.int64), f"{name}_index")
    node = make_node(GATHER, [source, index], {"axis": demand.axis}, name=name)
    node.outputs[0].type = source.type
    before.prepend(node)
    return node.outputs[0]


def rebuild_selection(model: ir.Model, search: DemandAnalysis, node: ir.Node, twin: ir.Node, demand: Demand) -> None:
    """The node that started it picks from fewer positions now."""
    picked = source_positions(search.call(node), demand.axis)
    assert picked is not None
    places = np.searchsorted(demand.positions, picked.reshape(-1)).astype(np.int64)
    call = search.call(node)
    scalar = len(call.out_shapes[0]) < len(call.shape(0))
    if not scalar and len(places) == 1:  # one position, several times
        places = places.repeat(call.out_shapes[0][demand.axis])
    index = add_constant(model.graph, places.reshape(()) if scalar else places, f"{twin.outputs[0].name}__index")
    new = make_node(GATHER, [twin.inputs[0], index], {"axis": demand.axis}, name=f"{twin.name}__rows")
    twin.prepend(new)
    replace_value(twin.outputs[0], new.outputs[0])
    model.graph.remove(twin, safe=True)


def rebuild_reshape(model: ir.Model, search: DemandAnalysis, node: ir.Node, twin: ir.Node) -> None:
    """All axes as they come, and one for the rest: right for any number of positions."""
    if node.op_type == RESHAPE and not node.domain:
        rank = len(search.call(node).out_shapes[0])
        target = np.asarray([0] * (rank - 1) + [-1], np.int64)
        shape = add_constant(model.graph, target, f"{twin.outputs[0].name}__shape")
        twin.replace_input_with(1, shape)
        twin.attributes.pop("allowzero", None)
