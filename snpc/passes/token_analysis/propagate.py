"""Where tokens go: a token axis followed forwards from one value, through everything that is made of it.

Every value behind gets the axes along which it has the tokens. What works per token, and attention over all of them,
goes on with fewer tokens as with many; what does not raises ``TokenPin`` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, has_subgraphs
from snpc.graph.traversal import ancestor_nodes, dependent_values, used_values
from snpc.ops.attention import attention_form
from snpc.ops.spec import SUMMED_OVER, Blocked, OpCall
from snpc.passes.token_analysis.side_inputs import check_side_input, side_input_error
from snpc.passes.token_analysis.state import (
    NeedsSideInput,
    SideInput,
    TokenAxes,
    TokenFlow,
    TokenNodeContext,
    TokenPin,
    TokenReduce,
)

MAX_FOLLOWED_TOKENS = 1 << 20


def follow_tokens(model: ir.Model, facts: ShapeFacts, value: ir.Value, axis: int) -> TokenFlow:
    """Follow the tokens of ``value`` as far as they can be followed; ``Flow.stuck`` says what ended it."""
    starts = {value: TokenAxes({axis: 0})}
    tried: list[TokenFlow] = []
    while True:
        tried.append(TokenFlow(value, frozenset(starts), dict(starts)))
        try:
            propagate_tokens(model, facts, tried[-1])
            return tried[-1]
        except NeedsSideInput as entered:
            tried[-1].pin = entered
            starts |= entered.side_inputs
        except TokenPin as stuck:
            tried[-1].pin = stuck
            return tried[0]


def propagate_tokens(model: ir.Model, facts: ShapeFacts, flow: TokenFlow) -> None:
    """Follow everything that ``flow`` starts from; of what goes with the stream only what does not lie in front."""
    value = flow.stream
    if value.is_graph_output():
        raise TokenPin(None, str(value.name), f"output {value.name} has all tokens")
    entered = flow.origins - {value}
    before = ancestor_nodes(value) if entered else set()
    for node in model.graph:
        if node in before or not any(v in flow.axes for v in used_values(node)):
            continue
        flow.nodes.append(node)
        for index, given in enumerate(node.inputs):
            if given in entered:
                flow.side_inputs.append(SideInput(node, index, flow.axes[given].axes, False, str(given.name)))
        propagate_token_node(TokenNodeContext(model, facts, flow, node))
    alone = dependent_values(model, entered, before) - dependent_values(model, [value]) if entered else ()
    for output in model.graph.outputs:
        if output in alone:
            raise TokenPin(
                output.producer(), str(output.name), f"output {output.name} is made of all entries of a mask"
            )


def propagate_token_node(step: TokenNodeContext) -> None:
    """Mark the outputs of one node."""
    node = step.node
    if has_subgraphs(node):
        raise TokenPin(node, str(node.name), "control flow: its body is not analysed")
    values = [v for v in (*node.inputs, *node.outputs[:1]) if v is not None]
    if step.spec.kind != "shape" and any(step.facts.shape.get(v) is None for v in values):
        raise TokenPin(node, str(node.outputs[0].name), "its shape cannot be worked out")
    found = TOKEN_RULES[step.spec.kind](step)
    for value, marks in zip(node.outputs, found, strict=False):
        if marks is None or not marks.axes:
            continue
        if value.is_graph_output():
            raise TokenPin(node, str(value.name), f"output {value.name} has all tokens")
        step.flow.axes[value] = marks


OutputTokenAxes = Sequence[TokenAxes | None]


def shift_token_axes(marks: TokenAxes, shift: int) -> TokenAxes:
    return TokenAxes({axis + shift: k for axis, k in marks.axes.items()}, frozenset(a + shift for a in marks.weighted))


def unify_token_axes(step: TokenNodeContext, parts: Sequence[tuple[int, TokenAxes]]) -> TokenAxes:
    axes: dict[int, int] = {}
    weighed: frozenset[int] = frozenset()
    for index, marks in parts:
        for axis, leading in marks.axes.items():
            if axes.setdefault(axis, leading) != leading:
                raise step.pin(index, "tokens meet others than themselves")
        weighed |= marks.weighted
    return TokenAxes(axes, weighed)


def token_pointwise(step: TokenNodeContext) -> OutputTokenAxes:
    rank = len(step.call.out_shapes[0])
    parts = []
    for index in range(len(step.node.inputs)):
        marks = step.axes(index)
        if marks is not None:
            parts.append((index, shift_token_axes(marks, rank - len(step.call.shape(index)))))
    whole = unify_token_axes(step, parts)
    for index in range(len(step.node.inputs)):
        if not step.call.has(index):
            continue
        shape = step.call.shape(index)
        mine = dict(parts).get(index, TokenAxes({})).axes
        own = {axis - rank + len(shape): whole.axes[axis] for axis in whole.axes.keys() - mine.keys()}
        own = {axis: leading for axis, leading in own.items() if axis >= 0 and shape[axis] > 1}
        if own:
            check_side_input(step, index, own, len(whole.axes) > 1)
    return [whole] * len(step.node.outputs)


def token_normalization(step: TokenNodeContext) -> OutputTokenAxes:
    spec, call = step.spec, step.call
    data = spec.data or (0,)
    if step.axes(data[0]) is None or any(step.axes(k) is not None for k in range(len(call.shapes)) if k not in data):
        raise step.pin(0, "a parameter of it has tokens")
    whole = unify_token_axes(step, [(k, m) for k in data if (m := step.axes(k)) is not None])
    if any(step.axes(k) is None for k in data):
        raise step.pin(data[-1], "tokens meet others than themselves")
    axes = set(spec.axes(call) if spec.axes is not None else ())
    over = axes & whole.axes.keys()
    if over and spec.reason != SUMMED_OVER:
        raise step.pin(0, spec.reason or "statistics are taken over all tokens")
    if over and len(axes) > 1:
        raise step.pin(0, "it sums over more than the tokens")
    for axis in over:
        step.flow.softmaxes.append(TokenReduce(step.node, 0, axis, whole.axes[axis]))
    whole = TokenAxes(whole.axes, whole.weighted | over)
    return [whole if call.out_shapes[k] == call.out_shapes[0] else None for k in range(len(call.out_shapes))]


def token_reduction(step: TokenNodeContext) -> OutputTokenAxes:
    marks, call = step.axes(0), step.call
    if marks is None or step.spec.axes is None:
        raise step.pin(0, "an axis that depends on tokens")
    axes = set(step.spec.axes(call))
    over = axes & marks.axes.keys()
    for axis in over - marks.weighted:
        if step.spec.pins != "norm" and not step.spec.adds_up:
            raise step.pin(0, step.spec.reason)
        noted = step.flow.means if step.spec.pins == "norm" else step.flow.sums
        noted.append(TokenReduce(step.node, 0, axis, marks.axes[axis]))
    kept = len(call.out_shapes[0]) == len(call.shape(0))
    left = {axis: k for axis, k in marks.axes.items() if axis not in over}
    place = {a: a if kept else a - sum(gone < a for gone in axes) for a in left}
    return [TokenAxes({place[a]: k for a, k in left.items()}, frozenset(place[a] for a in marks.weighted - over))]


def token_contraction(step: TokenNodeContext) -> OutputTokenAxes:
    spec, call = step.spec, step.call
    assert spec.letters is not None
    try:
        letters = spec.letters(call)
    except Blocked as block:
        raise step.pin(0, block.reason) from None
    terms = dict(zip(spec.operands, (letters.left, letters.right), strict=True))
    if any(step.axes(k) is not None for k in range(len(call.shapes)) if k not in terms):
        raise step.pin(spec.bias or 0, "its bias has tokens")
    marked = {k: {t[a]: n for a, n in m.axes.items()} for k, t in terms.items() if (m := step.axes(k)) is not None}
    weighed = {t[a] for k, t in terms.items() if (m := step.axes(k)) is not None for a in m.weighted}
    axes: dict[int, int] = {}
    for index, here in marked.items():
        other = next(k for k in terms if k != index)
        for letter, leading in here.items():
            if letter in letters.windowed:
                raise step.pin(index, "tokens are seen through a window")
            twin = letter in terms[other] and call.shape(other)[terms[other].index(letter)] > 1
            if twin and marked.get(other, {}).get(letter) != leading:
                raise side_input_error(
                    step, other, {terms[other].index(letter): leading}, "it mixes tokens by position"
                )
            if letter in letters.out:
                axes[letters.out.index(letter)] = leading
            elif not twin:
                raise step.pin(index, SUMMED_OVER)
            elif letter not in weighed and index == min(marked):
                step.flow.sums.append(TokenReduce(step.node, index, terms[index].index(letter), leading))
    if spec.bias is not None and spec.bias_letters is not None and call.has(spec.bias):
        wide = [c for c, n in zip(spec.bias_letters(call), call.shape(spec.bias), strict=False) if n > 1]
        if any(letters.out.index(c) in axes for c in wide):
            raise step.pin(spec.bias, "it holds a number for positions")
    return [TokenAxes(axes, frozenset(letters.out.index(c) for c in weighed if c in letters.out))]


def token_movement(step: TokenNodeContext) -> OutputTokenAxes:
    marks, call = step.axes(0), step.call
    if marks is None or any(step.axes(k) is not None for k in range(1, len(call.shapes))):
        raise step.pin(0, "where values go depends on tokens")
    found: list[dict[int, int]] = [{} for _ in step.node.outputs]
    weighed: list[set[int]] = [set() for _ in step.node.outputs]
    for axis, leading in marks.axes.items():
        for index, place in enumerate(moved_token_axes(step, call, axis, leading)):
            if place is not None:
                found[index][place[0]] = place[1]
                weighed[index] |= {place[0]} if axis in marks.weighted else set()
    return [TokenAxes(axes, frozenset(w)) for axes, w in zip(found, weighed, strict=True)]


def moved_token_axes(step: TokenNodeContext, call: OpCall, axis: int, leading: int) -> list[tuple[int, int] | None]:
    """Of every output: the axis that holds the tokens now, and how many leading ones are left out; None where it holds
    a few that are read by number."""
    size = call.shape(0)[axis]
    if size > MAX_FOLLOWED_TOKENS:
        raise step.pin(0, f"{size} positions are too many to follow one by one")
    view = [1] * len(call.shape(0))
    view[axis] = size
    assert step.spec.move is not None
    try:
        moved = step.spec.move(call, np.arange(size, dtype=np.int32).reshape(view))
    except Blocked as block:
        raise step.pin(0, block.reason) from None
    found: list[tuple[int, int] | None] = []
    for labels in moved:
        axes = [k for k, n in enumerate(labels.shape) if n > 1]
        flat = labels.reshape(-1)
        if len(axes) == 1 and 2 * len(flat) > size:
            if (np.diff(flat) != 1).any() or flat[-1] != size - 1:
                raise step.pin(0, "tokens are laid out in another order, or together with something else")
            found.append((axes[0], leading + int(flat[0])))
        elif len(axes) <= 1:
            step.flow.read_positions |= {leading + int(k) for k in flat}
            found.append(None)
        else:
            raise step.pin(0, "tokens are laid out on several axes")
    return found


def token_concat(step: TokenNodeContext) -> OutputTokenAxes:
    call = step.call
    axis = int(call.attrs["axis"]) % len(call.out_shapes[0])
    parts = [(k, m) for k in range(len(call.shapes)) if (m := step.axes(k)) is not None]
    whole = unify_token_axes(step, parts)
    if axis in whole.axes:
        raise step.pin(parts[0][0], "tokens are laid beside others")
    for index in range(len(call.shapes)):
        mine = step.axes(index)
        if mine is None or mine.axes != whole.axes:
            raise step.pin(index, "tokens are laid beside what is made for all positions")
    return [whole]


def token_attention(step: TokenNodeContext) -> OutputTokenAxes:
    node, call = step.node, step.call
    shape = attention_form(call, node.domain)
    if call.attrs.get("is_causal", 0) or call.attrs.get("unidirectional", 0):
        raise step.pin(shape.query, "which tokens see each other depends on their order")
    mask = fused_mask_input(step)
    entering = (*shape.others(call), *shape.past, *shape.rotary, shape.scores)
    if any(k is not None and k != mask and call.has(k) for k in entering):
        raise step.pin(shape.query, "a mask, a cache or a table for all positions enters it")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise step.pin(shape.query, "it hands out the keys and values of all positions")
    query, key, value = (step.axes(k) for k in (shape.query, shape.key, shape.value))
    if shape.packed:
        key = value = query
    if key is not None and value is not None and key.axes == value.axes:
        step.flow.softmaxes.append(TokenReduce(node, shape.key, -1, next(iter(key.axes.values()))))
    elif key is not None or value is not None:
        raise step.pin(shape.key, "tokens meet others than themselves")
    if mask is not None:
        sides = {2: query, 3: key}
        axes = {a: 0 for a, marks in sides.items() if marks is not None and call.shape(mask)[a] > 1}
        if any(marks is not None and any(marks.axes.values()) for marks in sides.values()):
            raise step.pin(mask, "some of the tokens only meet a mask")
        if axes:
            check_side_input(step, mask, axes, len(axes) > 1)
    return [query]


def fused_mask_input(step: TokenNodeContext) -> int | None:
    """The input that holds a mask [batch or 1, heads or 1, queries, keys], if there is one."""
    call = step.call
    index = attention_form(call, step.node.domain).scores
    one = index is not None and index in attention_form(call, step.node.domain).masks and call.has(index)
    return index if one and len(call.shape(index or 0)) == 4 else None


def token_shape_only(step: TokenNodeContext) -> OutputTokenAxes:
    return []


def token_by_position(step: TokenNodeContext) -> OutputTokenAxes:
    index = next((k for k in range(len(step.node.inputs)) if step.axes(k) is not None), 0)
    raise step.pin(index, "what it does to tokens depends on their positions")


def token_opaque(step: TokenNodeContext) -> OutputTokenAxes:
    index = next((k for k in range(len(step.node.inputs)) if step.axes(k) is not None), 0)
    raise step.pin(index, step.spec.reason)


TOKEN_RULES: dict[str, Callable[[TokenNodeContext], OutputTokenAxes]] = {
    "movement": token_movement,
    "concat": token_concat,
    "pointwise": token_pointwise,
    "contraction": token_contraction,
    "normalise": token_normalization,
    "reduce": token_reduction,
    "attention": token_attention,
    "rotary": token_by_position,
    "scatter": token_by_position,
    "shape": token_shape_only,
    "opaque": token_opaque,
}
