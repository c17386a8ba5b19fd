"""Token reduction as a graph rewrite, with the decisions as graph inputs.

``externalize_decisions`` makes a graph whose inputs say which tokens are removed. Label propagation, statistics, fits
and slices work on that graph: in it no decision flips because a weight changed in its last digit. ``embed_decisions``
(``tokens.close``) adds the nodes that decide, last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed, UserError
from snpc.graph import (
    ShapeFacts,
    alternative_dim_sizes,
    infer_graph,
    infer_node,
    initial_facts,
    opset_version,
    replace_graph_output,
)
from snpc.ops import ADD, ATTENTION_FORMS, DIV, LOG, MUL, RESHAPE, SUB, TRANSPOSE, WHERE, TensorCut, lookup
from snpc.passes.slicing import ShapeParameterEditor
from snpc.passes.token_analysis import TokenPoint, TokenReduce
from snpc.tokens.dynamic_lengths import (
    check_reduced_shapes,
    insert_token_count,
    kept_dim_sizes,
    replace_token_counts,
    resize_steps,
)
from snpc.tokens.methods import Merge, TokenStream
from snpc.tokens.protected import move_back, move_to_front
from snpc.tokens.step import TokenStep
from snpc.tokens.writer import TokenGraphBuilder


def externalize_decisions(
    model: ir.Model, facts: ShapeFacts, dim_sizes: Mapping[str, int], steps: Sequence[TokenStep]
) -> ir.Model:
    """A copy of ``model`` in which ``steps`` reduce the tokens. Decisions are new graph inputs, [batch, ...] each.

    Raises CheckFailed where the shapes do not come out right.
    """
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    batch = batch_dimension(model)
    current: ir.Value | None = None
    weights: list[tuple[TokenStep, ir.Value]] = []
    dynamic_streams: dict[str, ir.Value] = {}
    merged: list[MergedStream] = []
    for number, step in enumerate(steps):
        if number and not step.follows(steps[number - 1]):
            current = None
        writer = TokenGraphBuilder(copy.graph, step.prefix, stream_dtype(facts, step.point))
        stream = values[step.point.value]
        uses = list(stream.uses())
        decided = [decision_input(copy, step, k, batch, writer.dtype) for k in range(len(step.names))]
        whole = move_to_front(writer, step.settings, stream)
        reduced = step.method.reduce(writer, step.settings, TokenStream(whole, current), decided)
        for node, index in uses:
            node.replace_input_with(index, reduced.values)
        if step.exit is not None:
            merged.append(MergedStream(step, writer, whole, reduced.values, decided))
        current = reduced.sizes
        if step.settings.share is not None:
            dynamic_streams[step.prefix] = reduced.values
        if current is not None:
            weights.append((step, current))
    replace_exits(copy, merged, values, unmerge_tokens)
    reduce_side_inputs(copy, facts, steps)
    for step, value in weights:
        apply_token_sizes(copy, facts, step, value, later=[s for s, _ in weights if s.point.block > step.point.block])
    copy.graph.sort()
    recompute_token_counts(copy, model, facts, {**dim_sizes, **kept_dim_sizes(steps)}, steps, dynamic_streams)
    if dynamic_streams:
        other = alternative_dim_sizes(dim_sizes)
        other_facts = infer_graph(model, other)
        moved = resize_steps(steps, other_facts, nudge=True)
        check_reduced_shapes(
            infer_graph(copy, {**other, **kept_dim_sizes(moved)}), expected_shapes(other_facts, moved), copy
        )
    return copy


def batch_dimension(model: ir.Model) -> int | ir.SymbolicDim:
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) and not value.is_initializer():
            batch = value.shape[0]
            return batch if isinstance(batch, int) or batch.value else ir.SymbolicDim(f"{value.name}.0")
    raise UserError("the model has no input with a batch axis, so its tokens cannot be reduced")


def stream_dtype(facts: ShapeFacts, point: TokenPoint) -> ir.DataType:
    dtype = facts.dtype[point.stream]
    assert dtype is not None
    return dtype


def decision_input(
    copy: ir.Model, step: TokenStep, index: int, batch: int | ir.SymbolicDim, dtype: ir.DataType
) -> ir.Value:
    tensor = step.decisions[index]
    kind = ir.DataType.INT64 if tensor.integer else dtype
    shape = decision_shape(step, index, batch)
    value = ir.Value(name=step.names[index], shape=shape, type=ir.TensorType(kind))
    copy.graph.inputs.append(value)
    return value


def decision_shape(step: TokenStep, index: int, batch: int | ir.SymbolicDim) -> ir.Shape:
    named = (f"{step.prefix}_{size}" if isinstance(size, str) else size for size in step.decisions[index].shape)
    return ir.Shape([batch, *named])


# -- all tokens back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedStream:
    """The stream before and after a step that has an exit, [B, N, D], protected tokens moved to the front, and
    [B, N', D], and the decisions of the step."""

    step: TokenStep
    writer: TokenGraphBuilder
    before: ir.Value
    after: ir.Value
    decided: list[ir.Value]


def unmerge_tokens(merged: MergedStream, values: ir.Value) -> ir.Value:
    """[B, N', D] -> [B, N, D]: all tokens that the step of ``merged`` had, from what became of the merged ones."""
    step, writer = merged.step, merged.writer
    assert step.unmerge is not None and isinstance(step.method, Merge)
    places = step.method.assignment(writer, step.settings, merged.before, merged.decided)
    if step.unmerge.form == "copy":
        return move_back(writer, step.settings, writer.gather_rows(values, places))
    added = writer.gather_rows(writer.op(SUB, values, merged.after), places)
    return move_back(writer, step.settings, writer.op(ADD, merged.before, added))


def replace_exits(
    copy: ir.Model,
    merged: Sequence[MergedStream],
    values: Mapping[str, ir.Value],
    restore: Callable[[MergedStream, ir.Value], ir.Value],
) -> None:
    """Replace what is read behind each exit: the stream there, restored by the steps of the span, last one first."""
    for name in dict.fromkeys(m.step.exit.value for m in merged if m.step.exit is not None):
        out = values[name]
        uses, is_output, restored = list(out.uses()), out.is_graph_output(), out
        for one in reversed(merged):
            if one.step.exit is not None and one.step.exit.value == name:
                restored = restore(one, restored)
        for node, index in uses:
            node.replace_input_with(index, restored)
        if is_output and restored is not out:
            restored.shape, restored.type, out.shape = out.shape, out.type, None
            replace_graph_output(copy.graph, out, restored, f"{name}__merged")


# -- side inputs ------------------------------------------------------------------------------------------------------


def reduce_side_inputs(copy: ir.Model, facts: ShapeFacts, steps: Sequence[TokenStep]) -> None:
    """Remove the entries of removed tokens from the side inputs (masks, position tables) after each point."""
    nodes = {node.name: node for node in copy.graph}
    inputs = {str(v.name): v for v in copy.graph.inputs}
    thinned: dict[tuple[str, str, tuple[int, ...]], ir.Value] = {}
    for step in steps:
        writer = TokenGraphBuilder(copy.graph, f"{step.prefix}_side", stream_dtype(facts, step.point))
        for side in step.flow.side_inputs:
            if side.uniform and step is not steps[0] and side.node in steps[0].flow.nodes:
                continue  # the first step left one entry of it
            node = nodes[side.node.name]
            value = node.inputs[side.index]
            assert value is not None
            key = (step.prefix, str(value.name), tuple(side.axes))
            if key not in thinned:
                if side.uniform:
                    thinned[key] = value
                    for axis in side.axes:
                        thinned[key] = writer.slice(thinned[key], axis, 0, 1)
                else:
                    thinned[key] = value
                    rank = len(facts.shape[side.node.inputs[side.index]] or ())  # type: ignore[index]
                    for axis in side.axes:
                        thinned[key] = gather_along(writer, step, thinned[key], rank, axis, inputs[step.names[0]])
            node.replace_input_with(side.index, thinned[key])


def gather_along(
    writer: TokenGraphBuilder, step: TokenStep, value: ir.Value, rank: int, axis: int, keep: ir.Value
) -> ir.Value:
    """``value`` [B or 1, ..] of ``rank`` axes with the entries along ``axis`` of the kept tokens only."""
    order = [0, axis, *(k for k in range(1, rank) if k != axis)]
    token_first = writer.op(TRANSPOSE, value, perm=order)
    shape = writer.concat(0, writer.sizes(keep, 0), writer.ints(*[1] * (rank - 1)))
    token_first = move_to_front(writer, step.settings, writer.expand(token_first, shape))
    front = [writer.slice(token_first, 1, 0, step.settings.leading)] if step.settings.leading else []
    gathered = writer.concat(1, *front, writer.gather_rows(token_first, keep))
    return writer.op(TRANSPOSE, gathered, perm=[order.index(k) for k in range(rank)])


# -- token sizes ------------------------------------------------------------------------------------------------------


def apply_token_sizes(
    copy: ir.Model, facts: ShapeFacts, step: TokenStep, sizes: ir.Value, later: Sequence[TokenStep]
) -> None:
    """Weight each token by ``sizes`` [B, N, 1] after the point of ``step``: log(size) is added to the scores of every
    softmax, and means and sums are weighted. Nodes after a later point are left to its step."""
    writer = TokenGraphBuilder(copy.graph, f"{step.prefix}_weigh", stream_dtype(facts, step.point))
    behind = {node.name for s in later for node in s.flow.nodes}
    nodes = {node.name: node for node in copy.graph}
    logs = None
    for weighing in step.flow.softmaxes:
        if weighing.node.name in behind:
            continue
        logs = logs if logs is not None else writer.op(LOG, sizes)
        if weighing.axis < 0:
            bias_fused_attention(writer, nodes[weighing.node.name], logs, has_boolean_mask(facts, weighing.node))
        else:
            shape = facts.shape[weighing.node.inputs[0]]  # type: ignore[index]
            spread = broadcast_along(writer, facts, step, logs, weighing, shape or ())
            insert_binary(writer, nodes[weighing.node.name], 0, ADD, spread)
    for weighing in step.flow.means:
        if weighing.node.name in behind:
            continue
        own = writer.slice(sizes, 1, weighing.offset)
        mean = writer.op(DIV, writer.reduce_sum(own, 1, keep=True), writer.cast(writer.sizes(own, 1)))
        share = writer.op(DIV, own, mean)
        shape = facts.shape[weighing.node.inputs[0]]  # type: ignore[index]
        pooled = TokenReduce(weighing.node, 0, weighing.axis, 0)
        insert_binary(
            writer, nodes[weighing.node.name], 0, MUL, broadcast_along(writer, facts, step, share, pooled, shape or ())
        )
    for weighing in step.flow.sums:
        if weighing.node.name in behind:
            continue
        value = weighing.node.inputs[weighing.index]
        assert value is not None
        counts = broadcast_along(writer, facts, step, sizes, weighing, facts.shape[value] or ())
        insert_binary(writer, nodes[weighing.node.name], weighing.index, MUL, writer.cast(counts, facts.dtype[value]))


def broadcast_along(
    writer: TokenGraphBuilder,
    facts: ShapeFacts,
    step: TokenStep,
    value: ir.Value,
    weighing: TokenReduce,
    shape: tuple[int, ...],
) -> ir.Value:
    """``value`` [B, N, 1] reshaped to broadcast along the token axis of a node's input of ``shape``; repeated per head
    where batch and heads share an axis."""
    batch = (facts.shape[step.point.stream] or (0,))[0]
    if weighing.offset:
        value = writer.slice(value, 1, weighing.offset)
    target = [0] + [1] * (len(shape) - 1)
    target[weighing.axis] = -1
    if shape[0] == batch:
        return writer.reshape(value, *target)
    heads = shape[0] // batch
    if weighing.axis == 0 or heads * batch != shape[0]:
        raise UserError(
            f"{weighing.node.name}: merged tokens cannot be weighted after the batch axis is lost; use topk"
        )
    length = writer.sizes(value, 1)
    repeated = writer.expand(
        writer.swap_last_axes(value), writer.concat(0, writer.ints(1, heads), length)
    )  # [B, heads, N]
    one = writer.ints(1)
    sizes = [writer.ints(-1), *[length if k == weighing.axis else one for k in range(1, len(shape))]]
    return writer.op(RESHAPE, repeated, writer.concat(0, *sizes))


def insert_binary(writer: TokenGraphBuilder, node: ir.Node, index: int, op: str, other: ir.Value) -> None:
    value = node.inputs[index]
    assert value is not None
    node.replace_input_with(index, writer.op(op, value, other))


def bias_fused_attention(writer: TokenGraphBuilder, node: ir.Node, logs: ir.Value, is_boolean: bool) -> None:
    """Add ``logs`` to the mask of a fused node, [B, 1, queries, keys]. ``is_boolean``: its mask is true where keys
    count."""
    form = ATTENTION_FORMS[node.domain, node.op_type]
    index = form.scores
    query = node.inputs[form.query]
    assert query is not None and index is not None
    row = writer.unsqueeze(writer.swap_last_axes(logs), 1)
    rank = 3 if form.packed or not has_head_axis(node) else 4
    queries = writer.sizes(query, rank - 2)
    many = writer.concat(0, writer.ints(1, 1), queries, writer.ints(1))
    while len(node.inputs) <= index:
        node.resize_inputs(len(node.inputs) + 1)
    mask, expanded = node.inputs[index], writer.expand(row, many)
    node.replace_input_with(index, apply_mask(writer, expanded, mask, is_boolean) if mask is not None else expanded)


def apply_mask(writer: TokenGraphBuilder, scores: ir.Value, mask: ir.Value, is_boolean: bool) -> ir.Value:
    """``scores`` with ``mask`` added; of a boolean mask, -inf where it is false."""
    return writer.op(WHERE, mask, scores, writer.scalar(-np.inf)) if is_boolean else writer.op(ADD, scores, mask)


def has_boolean_mask(facts: ShapeFacts, node: ir.Node) -> bool:
    """Does a fused node have a boolean mask, true where keys count?"""
    index = ATTENTION_FORMS[node.domain, node.op_type].scores
    mask = node.inputs[index] if index is not None and index < len(node.inputs) else None
    return mask is not None and facts.dtype.get(mask) == ir.DataType.BOOL


def has_head_axis(node: ir.Node) -> bool:
    return "num_heads" not in node.attributes and "q_num_heads" not in node.attributes


# -- shape parameters -------------------------------------------------------------------------------------------------


def recompute_token_counts(
    copy: ir.Model,
    model: ir.Model,
    facts: ShapeFacts,
    dim_sizes: Mapping[str, int],
    steps: Sequence[TokenStep],
    dynamic_streams: Mapping[str, ir.Value],
) -> None:
    """Recompute the shape parameters that hold a number of tokens (targets of reshapes, say).

    ``dynamic_streams``: by step its stream, where the number of tokens is computed in the graph. Raises CheckFailed
    where the shapes do not come out right.
    """
    expected = expected_shapes(facts, steps)
    old = {node.name: node for node in model.graph}
    after = initial_facts(copy, dim_sizes)
    repairs = ShapeParameterEditor(copy, model, facts, after, dim_sizes)
    lengths: dict[str, ir.Value] = {}
    for node in list(copy.graph):
        infer_node(after, node, copy, dim_sizes)
        twin = old.get(node.name)
        for k, value in enumerate(twin.outputs if twin is not None else ()):
            shape = expected.get(str(value.name))
            if twin is None or shape is None or after.shape.get(node.outputs[k]) == shape:
                continue
            spec = lookup(node.domain, node.op_type)
            if spec.recompute is None:
                raise CheckFailed(f"{node.op_type} {node.name}: gives {after.shape.get(node.outputs[k])}, not {shape}")
            call = facts.call(twin, opset_version(model, twin.domain))
            data = token_cut(call.shape(0), expected.get(str(twin.inputs[0].name), call.shape(0)))  # type: ignore[union-attr]
            outs = [
                token_cut(call.out_shapes[i], expected.get(str(v.name), call.out_shapes[i]))
                for i, v in enumerate(twin.outputs)
            ]
            fix = spec.recompute(call, data, outs)
            step = next(s for s in reversed(steps) if value in s.flow.axes)
            for index, array in fix.inputs.items():
                if step.prefix in dynamic_streams:
                    if step.prefix not in lengths:
                        stream = dynamic_streams[step.prefix]
                        lengths[step.prefix] = insert_token_count(repairs, node, stream, step.prefix)
                    replace_token_counts(repairs, node, index, array, step.flow.axes[value], lengths[step.prefix])
                else:
                    repairs.set_input(twin, node, index, array)
            infer_node(after, node, copy, dim_sizes)
            if after.shape.get(node.outputs[k]) != shape:
                raise CheckFailed(f"{node.op_type} {node.name}: its sizes cannot be recomputed for fewer tokens")


def token_cut(old: tuple[int, ...], new: tuple[int, ...]) -> TensorCut:
    return TensorCut(old, new, lambda axis, position: min(position, new[axis]), lambda axis: None)


def expected_shapes(facts: ShapeFacts, steps: Sequence[TokenStep]) -> dict[str, tuple[int, ...]]:
    """The new shapes of all values after the points, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in steps:  # later ones overwrite what lies behind them too
        for value, marks in step.flow.axes.items():
            if value in step.flow.origins:
                continue
            shape = list(facts.shape[value] or ())
            for axis, leading in marks.axes.items():
                shape[axis] = step.remaining - leading
            shapes[str(value.name)] = tuple(shape)
    return shapes
