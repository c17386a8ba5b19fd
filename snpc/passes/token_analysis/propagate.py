"""Token propagation: follows a token axis from one value through all nodes that depend on it.

Every value that is reached gets its token axes. Operators that work per token, and attention over all tokens, accept
any number of tokens. Other operators raise TokenPin with the reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import dependent_values, has_subgraphs
from snpc.ops import SUBGRAPH, SUMMED_OVER, Blocked, OpCall, attention_form, lookup
from snpc.passes.token_analysis.side_inputs import check_side_input, side_input_error
from snpc.passes.token_analysis.state import (
    NeedsSideInput,
    SideInput,
    TokenAxes,
    TokenFlow,
    TokenGraph,
    TokenNodeContext,
    TokenPin,
    TokenReduce,
)

MAX_FOLLOWED_TOKENS = 1 << 20
BYPASS = "the tokens in front of it are read behind it too"


def follow_tokens(graph: TokenGraph, value: ir.Value, axis: int, end: ir.Value | None = None) -> TokenFlow:
    """Follow the tokens along ``axis`` of ``value``, up to ``end``. ``TokenFlow.pin`` says what stopped them, None if
    nothing did."""
    origins = {value: TokenAxes({axis: 0})}
    attempts: list[TokenFlow] = []
    while True:
        attempts.append(TokenFlow(value, frozenset(origins), dict(origins), end=end))
        try:
            propagate_tokens(graph, attempts[-1])
            return attempts[-1]
        except NeedsSideInput as needs:
            attempts[-1].pin = needs
            origins |= needs.side_inputs
        except TokenPin as pin:
            attempts[-1].pin = pin
            return attempts[0]


def propagate_tokens(graph: TokenGraph, flow: TokenFlow) -> None:
    """Follow all origins of ``flow``. Ancestors of the stream are skipped. Raises TokenPin, or NeedsSideInput."""
    value = flow.stream
    if value.is_graph_output() and flow.end is None:
        raise TokenPin(None, str(value.name), f"graph output {value.name} has all tokens")
    side_origins = flow.origins - {value}
    skipped = flow.stream_ancestors if side_origins else set()
    positions = graph.positions
    waiting = [(positions[node], node) for origin in flow.origins for node in graph.readers.get(origin, ())]
    heapq.heapify(waiting)  # by position, which no two nodes share
    last = -1
    while waiting:
        position, node = heapq.heappop(waiting)
        if position == last or node in skipped:
            continue
        last = position
        if flow.end is not None:
            check_before_end(graph, flow.end, node)
        flow.nodes.append(node)
        for index, operand in enumerate(node.inputs):
            if operand in side_origins:
                flow.side_inputs.append(SideInput(node, index, flow.axes[operand].axes, False, str(operand.name)))
        propagate_token_node(TokenNodeContext(graph, flow, node))
        for out in node.outputs:
            for reader in graph.readers.get(out, ()) if out in flow.axes and out is not flow.end else ():
                heapq.heappush(waiting, (positions[reader], reader))
    from_side_inputs_only = (
        dependent_values(graph.model, side_origins, skipped) - dependent_values(graph.model, [value])
        if side_origins
        else ()
    )
    for output in graph.model.graph.outputs:
        if output in from_side_inputs_only:
            raise TokenPin(
                output.producer(),
                str(output.name),
                f"graph output {output.name} is computed from all entries of a mask",
            )


def check_before_end(graph: TokenGraph, end: ir.Value, node: ir.Node) -> None:
    """Raises TokenPin where ``node``, which reads tokens, does not lie before ``end``: some go past it."""
    if end in node.inputs or graph.positions[node] > producer_position(graph, end):
        raise TokenPin(node, str(end.name), BYPASS)


def producer_position(graph: TokenGraph, value: ir.Value) -> int:
    producer = value.producer()
    return graph.positions[producer] if producer is not None else -1


def propagate_token_node(context: TokenNodeContext) -> None:
    """Set the token axes of the outputs of one node. Raises TokenPin where tokens cannot be removed."""
    node = context.node
    if has_subgraphs(node):
        raise TokenPin(node, str(node.name), SUBGRAPH)
    values = [v for v in (*node.inputs, *node.outputs[:1]) if v is not None]
    if context.spec.kind != "shape" and any(context.facts.shape.get(v) is None for v in values):
        raise TokenPin(node, str(node.outputs[0].name), "its shape cannot be inferred")
    output_axes = TOKEN_RULES[context.spec.kind](context)
    for value, axes in zip(node.outputs, output_axes, strict=False):
        if axes is None or not axes.axes:
            continue
        if value.is_graph_output() and value is not context.flow.end:
            raise TokenPin(node, str(value.name), f"graph output {value.name} has all tokens")
        context.flow.axes[value] = axes


def values_that_end_alike(flow: TokenFlow) -> set[ir.Value]:
    """Values of a flow that ended in a graph output whose tokens end there too, by whatever way the flow got to them.

    From them leads a path of operators each of which hands on the one token axis of its input, no matter what its other
    inputs are. So a model of many layers is followed once, and not once per layer.
    """
    pin = flow.pin
    if (
        pin is None
        or pin.node is None
        or not any(v.is_graph_output() and v.name == pin.tensor for v in pin.node.outputs)
    ):
        return set()
    alike: set[ir.Value] = set()
    pending = [pin.node]
    while pending:
        node = pending.pop()
        for value in node.inputs:
            if value is None or value in alike or not hands_on(flow, node, value):
                continue
            alike.add(value)
            producer = value.producer()
            if producer is not None and value is not flow.stream:
                pending.append(producer)
    return alike


def hands_on(flow: TokenFlow, node: ir.Node, value: ir.Value) -> bool:
    """Whether the outputs of ``node`` have the token axis of its input ``value``, whatever else has tokens."""
    if not is_plain(flow, value) or not all(is_plain(flow, v) for v in node.outputs if v in flow.axes):
        return False
    kind = lookup(node.domain, node.op_type).kind
    others = [v for v in node.inputs if v is not None and v is not value]
    return kind == "pointwise" or (
        kind in ("contraction", "normalize", "movement") and flow.axes.keys().isdisjoint(others)
    )


def is_plain(flow: TokenFlow, value: ir.Value) -> bool:
    """Whether a value has all tokens of the flow, on one axis, and no results of a softmax."""
    token_axes = flow.axes.get(value)
    return token_axes is not None and list(token_axes.axes.values()) == [0] and not token_axes.weighted


OutputTokenAxes = Sequence[TokenAxes | None]


def shift_token_axes(token_axes: TokenAxes, shift: int) -> TokenAxes:
    """``token_axes`` of a value that gets ``shift`` axes in front."""
    return TokenAxes(
        {axis + shift: k for axis, k in token_axes.axes.items()}, frozenset(a + shift for a in token_axes.weighted)
    )


def unify_token_axes(context: TokenNodeContext, parts: Sequence[tuple[int, TokenAxes]]) -> TokenAxes:
    """Token axes of several inputs (index, axes) combined. Raises TokenPin if they leave out different tokens."""
    axes: dict[int, int] = {}
    weighted: frozenset[int] = frozenset()
    for index, token_axes in parts:
        for axis, offset in token_axes.axes.items():
            if axes.setdefault(axis, offset) != offset:
                raise context.pin(index, "token streams of different origin are combined")
        weighted |= token_axes.weighted
    return TokenAxes(axes, weighted)


def token_pointwise(context: TokenNodeContext) -> OutputTokenAxes:
    """Token axes of all inputs combined; inputs without them may be side inputs."""
    rank = len(context.call.out_shapes[0])
    parts = []
    for index in range(len(context.node.inputs)):
        token_axes = context.axes(index)
        if token_axes is not None:
            parts.append((index, shift_token_axes(token_axes, rank - len(context.call.shape(index)))))
    combined = unify_token_axes(context, parts)
    for index in range(len(context.node.inputs)):
        if not context.call.has(index):
            continue
        shape = context.call.shape(index)
        own_axes = dict(parts).get(index, TokenAxes({})).axes
        missing = {axis - rank + len(shape): combined.axes[axis] for axis in combined.axes.keys() - own_axes.keys()}
        missing = {axis: offset for axis, offset in missing.items() if axis >= 0 and shape[axis] > 1}
        if missing:
            check_side_input(context, index, missing, len(combined.axes) > 1)
    return [combined] * len(context.node.outputs)


def token_normalization(context: TokenNodeContext) -> OutputTokenAxes:
    """Element-wise, unless it normalizes over the tokens: a softmax is recorded."""
    spec, call = context.spec, context.call
    data = spec.data or (0,)
    if context.axes(data[0]) is None or any(
        context.axes(k) is not None for k in range(len(call.shapes)) if k not in data
    ):
        raise context.pin(0, "a parameter of the normalization depends on tokens")
    combined = unify_token_axes(context, [(k, m) for k in data if (m := context.axes(k)) is not None])
    if any(context.axes(k) is None for k in data):
        raise context.pin(data[-1], "token streams of different origin are combined")
    axes = set(spec.axes(call) if spec.axes is not None else ())
    normalized_tokens = axes & combined.axes.keys()
    if normalized_tokens and spec.reason != SUMMED_OVER:
        raise context.pin(0, spec.reason or "its statistics are taken over all tokens")
    if normalized_tokens and len(axes) > 1:
        raise context.pin(0, "it normalizes over tokens and another axis together")
    for axis in normalized_tokens:
        context.flow.softmaxes.append(TokenReduce(context.node, 0, axis, combined.axes[axis]))
    combined = TokenAxes(combined.axes, combined.weighted | normalized_tokens)
    return [combined if call.out_shapes[k] == call.out_shapes[0] else None for k in range(len(call.out_shapes))]


def token_reduction(context: TokenNodeContext) -> OutputTokenAxes:
    """A mean or sum over tokens is recorded; other reductions over tokens are pinned."""
    token_axes, call = context.axes(0), context.call
    if token_axes is None or context.spec.axes is None:
        raise context.pin(0, "the reduced axes depend on tokens")
    axes = set(context.spec.axes(call))
    reduced_tokens = axes & token_axes.axes.keys()
    for axis in reduced_tokens - token_axes.weighted:
        if context.spec.pins != "norm" and not context.spec.adds_up:
            raise context.pin(0, context.spec.reason)
        reductions = context.flow.means if context.spec.pins == "norm" else context.flow.sums
        reductions.append(TokenReduce(context.node, 0, axis, token_axes.axes[axis]))
    kept = len(call.out_shapes[0]) == len(call.shape(0))
    remaining = {axis: k for axis, k in token_axes.axes.items() if axis not in reduced_tokens}
    new_axis = {a: a if kept else a - sum(reduced < a for reduced in axes) for a in remaining}
    return [
        TokenAxes(
            {new_axis[a]: k for a, k in remaining.items()},
            frozenset(new_axis[a] for a in token_axes.weighted - reduced_tokens),
        )
    ]


def token_contraction(context: TokenNodeContext) -> OutputTokenAxes:
    """Token axes by letters; a sum over tokens is recorded."""
    spec, call = context.spec, context.call
    assert spec.letters is not None
    try:
        letters = spec.letters(call)
    except Blocked as block:
        raise context.pin(0, block.reason) from None
    terms = dict(zip(spec.operands, (letters.left, letters.right), strict=True))
    if any(context.axes(k) is not None for k in range(len(call.shapes)) if k not in terms):
        raise context.pin(spec.bias or 0, "the bias depends on tokens")
    letters_by_operand = {
        k: {t[a]: n for a, n in m.axes.items()} for k, t in terms.items() if (m := context.axes(k)) is not None
    }
    weighted = {t[a] for k, t in terms.items() if (m := context.axes(k)) is not None for a in m.weighted}
    axes: dict[int, int] = {}
    for index, operand_letters in letters_by_operand.items():
        other = next(k for k in terms if k != index)
        for letter, offset in operand_letters.items():
            if letter in letters.windowed:
                raise context.pin(index, "a window spans several tokens")
            in_other_operand = letter in terms[other] and call.shape(other)[terms[other].index(letter)] > 1
            if in_other_operand and letters_by_operand.get(other, {}).get(letter) != offset:
                raise side_input_error(
                    context, other, {terms[other].index(letter): offset}, "a weight mixes tokens by position"
                )
            if letter in letters.out:
                axes[letters.out.index(letter)] = offset
            elif not in_other_operand:
                raise context.pin(index, SUMMED_OVER)
            elif letter not in weighted and index == min(letters_by_operand):
                context.flow.sums.append(TokenReduce(context.node, index, terms[index].index(letter), offset))
    if spec.bias is not None and spec.bias_letters is not None and call.has(spec.bias):
        bias_letters = [c for c, n in zip(spec.bias_letters(call), call.shape(spec.bias), strict=False) if n > 1]
        if any(letters.out.index(c) in axes for c in bias_letters):
            raise context.pin(spec.bias, "the bias has an entry for every position")
    return [TokenAxes(axes, frozenset(letters.out.index(c) for c in weighted if c in letters.out))]


def token_movement(context: TokenNodeContext) -> OutputTokenAxes:
    """Token axes after movement, found by moving the positions."""
    token_axes, call = context.axes(0), context.call
    if token_axes is None or any(context.axes(k) is not None for k in range(1, len(call.shapes))):
        raise context.pin(0, "where it moves values depends on tokens")
    output_axes: list[dict[int, int]] = [{} for _ in context.node.outputs]
    weighted: list[set[int]] = [set() for _ in context.node.outputs]
    for axis, offset in token_axes.axes.items():
        for index, moved in enumerate(moved_token_axes(context, call, axis, offset)):
            if moved is not None:
                output_axes[index][moved[0]] = moved[1]
                weighted[index] |= {moved[0]} if axis in token_axes.weighted else set()
    return [TokenAxes(axes, frozenset(w)) for axes, w in zip(output_axes, weighted, strict=True)]


def moved_token_axes(context: TokenNodeContext, call: OpCall, axis: int, offset: int) -> list[tuple[int, int] | None]:
    """For each output: its token axis and the number of leading tokens that it leaves out; None where it has only some
    tokens at fixed positions, which are recorded."""
    size = call.shape(0)[axis]
    if size > MAX_FOLLOWED_TOKENS:
        raise context.pin(0, f"the token axis has {size} entries, at most {MAX_FOLLOWED_TOKENS} are supported")
    view = [1] * len(call.shape(0))
    view[axis] = size
    assert context.spec.move is not None
    try:
        moved = context.spec.move(call, np.arange(size, dtype=np.int32).reshape(view))
    except Blocked as block:
        raise context.pin(0, block.reason) from None
    moved_axes: list[tuple[int, int] | None] = []
    for labels in moved:
        axes = [k for k, n in enumerate(labels.shape) if n > 1]
        flat = labels.reshape(-1)
        if len(axes) == 1 and 2 * len(flat) > size:
            if (np.diff(flat) != 1).any() or flat[-1] != size - 1:
                raise context.pin(0, "tokens are reordered, or merged with another axis")
            moved_axes.append((axes[0], offset + int(flat[0])))
        elif len(axes) <= 1:
            context.flow.read_positions |= {offset + int(k) for k in flat}
            moved_axes.append(None)
        else:
            raise context.pin(0, "the token axis is split into several axes")
    return moved_axes


def token_concat(context: TokenNodeContext) -> OutputTokenAxes:
    """Concatenation along another axis than the tokens."""
    call = context.call
    axis = int(call.attrs["axis"]) % len(call.out_shapes[0])
    parts = [(k, m) for k in range(len(call.shapes)) if (m := context.axes(k)) is not None]
    combined = unify_token_axes(context, parts)
    if axis in combined.axes:
        raise context.pin(parts[0][0], "tokens are concatenated with other tokens")
    for index in range(len(call.shapes)):
        operand_axes = context.axes(index)
        if operand_axes is None or operand_axes.axes != combined.axes:
            raise context.pin(index, "tokens are concatenated with a tensor that has an entry for every position")
    return [combined]


def token_attention(context: TokenNodeContext) -> OutputTokenAxes:
    """Fused attention: a softmax over the tokens of keys and values."""
    node, call = context.node, context.call
    shape = attention_form(call, node.domain)
    if call.attrs.get("is_causal", 0) or call.attrs.get("unidirectional", 0):
        raise context.pin(shape.query, "causal attention: which tokens attend to each other depends on their order")
    mask = fused_mask_input(context)
    position_inputs = (*shape.others(call), *shape.past, *shape.rotary, shape.scores)
    if any(k is not None and k != mask and call.has(k) for k in position_inputs):
        raise context.pin(
            shape.query, "the fused attention node has a mask, a KV cache or a table with an entry for every position"
        )
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise context.pin(shape.query, "the fused attention node outputs the keys and values of all positions")
    query, key, value = (context.axes(k) for k in (shape.query, shape.key, shape.value))
    if shape.packed:
        key = value = query
    if key is not None and value is not None and key.axes == value.axes:
        context.flow.softmaxes.append(TokenReduce(node, shape.key, -1, next(iter(key.axes.values()))))
    elif key is not None or value is not None:
        raise context.pin(shape.key, "token streams of different origin are combined")
    if mask is not None:
        axes_of_mask = {2: query, 3: key}
        axes = {a: 0 for a, token_axes in axes_of_mask.items() if token_axes is not None and call.shape(mask)[a] > 1}
        if any(token_axes is not None and any(token_axes.axes.values()) for token_axes in axes_of_mask.values()):
            raise context.pin(mask, "the mask covers only some of the tokens")
        if axes:
            check_side_input(context, mask, axes, len(axes) > 1)
    return [query]


def fused_mask_input(context: TokenNodeContext) -> int | None:
    """Index of the mask input, [batch or 1, heads or 1, queries, keys]; None if there is none."""
    call = context.call
    index = attention_form(call, context.node.domain).scores
    is_mask = index is not None and index in attention_form(call, context.node.domain).masks and call.has(index)
    return index if is_mask and len(call.shape(index or 0)) == 4 else None


def token_shape_only(context: TokenNodeContext) -> OutputTokenAxes:
    """Outputs that depend on shapes only have no tokens."""
    return []


def token_by_position(context: TokenNodeContext) -> OutputTokenAxes:
    """Operators that depend on positions pin the tokens."""
    index = next((k for k in range(len(context.node.inputs)) if context.axes(k) is not None), 0)
    raise context.pin(index, "its effect on tokens depends on their positions")


def token_opaque(context: TokenNodeContext) -> OutputTokenAxes:
    """Pin the tokens, with the operator's reason."""
    index = next((k for k in range(len(context.node.inputs)) if context.axes(k) is not None), 0)
    raise context.pin(index, context.spec.reason)


TOKEN_RULES: dict[str, Callable[[TokenNodeContext], OutputTokenAxes]] = {
    "movement": token_movement,
    "concat": token_concat,
    "pointwise": token_pointwise,
    "contraction": token_contraction,
    "normalize": token_normalization,
    "reduce": token_reduction,
    "attention": token_attention,
    "rotary": token_by_position,
    "sample": token_opaque,
    "scatter": token_by_position,
    "choose": token_opaque,
    "one_hot": token_opaque,
    "experts": token_opaque,
    "shape": token_shape_only,
    "opaque": token_opaque,
}
