"""Embedded decisions: nodes that score the tokens by attention and decide which are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.ops import ATTENTION_FORMS, GATHER, MUL, RESHAPE, SOFTMAX, TRANSPOSE
from snpc.tokens.methods import StepSettings, blend_scores
from snpc.tokens.open import apply_mask, has_head_axis
from snpc.tokens.protected import move_to_front, new_order
from snpc.tokens.step import TokenStep
from snpc.tokens.writer import TokenGraphBuilder

MIN_SCORE_SHARE = 1e-3  # of the mean: with an offline score of 0 a position would never be kept


def embed_decisions(model: ir.Model, steps: Sequence[TokenStep], dtypes: Mapping[str, ir.DataType]) -> None:
    """Replace the decision inputs of ``model``, in place, by nodes that decide. ``dtypes``: of the stream, by point."""
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    nodes = {str(node.name): node for node in model.graph}
    origin: ir.Value | None = None
    moved: StepSettings | None = None
    for number, step in enumerate(steps):
        dtype = dtypes[step.point.value]
        writer = TokenGraphBuilder(model.graph, f"{step.prefix}_decide", dtype)
        before = [earlier for earlier in steps[:number] if step.follows(earlier)]
        scores = attention_scores(writer, step, before, values, nodes) if step.method.needs_scores else None
        moved = step.settings if step.settings.protected else moved
        if scores is not None:
            scores = move_to_front(writer, step.settings, scores)
        if scores is not None and step.positions:
            scores = blend_scores(writer, scores, add_offline_scores(writer, step, origin, moved))
        stream = move_to_front(writer, step.settings, values[step.point.value])
        if dtype != ir.DataType.FLOAT:
            stream = writer.cast(stream, ir.DataType.FLOAT)
        decided = step.method.decide(writer, step.settings, stream, scores)
        for name, decision in zip(step.names, decided, strict=True):
            graph_input = next(v for v in model.graph.inputs if v.name == name)
            graph_input.replace_all_uses_with(decision)
            decision.shape = graph_input.shape
            model.graph.inputs.remove(graph_input)
            graph_input.name = f"{name}__open"
            decision.name = name
        if any(later.positions for later in steps[number + 1 :]):
            origin = track_origins(writer, step, decided[0], origin)
    model.graph.sort()


def add_offline_scores(
    writer: TokenGraphBuilder, step: TokenStep, origin: ir.Value | None, moved: StepSettings | None
) -> ir.Value:
    """[B or 1, N]: the offline scores of the positions that the tokens had in the full stream. ``moved``: the step that
    moved protected tokens to the front; origins are counted from then on."""
    table = np.asarray(step.positions, np.float32)
    table = table[new_order(moved)] if moved is not None else table
    table = np.maximum(table, MIN_SCORE_SHARE * table[step.settings.leading :].mean())
    if origin is None:
        return writer.constant(table[None])
    return writer.op(GATHER, writer.constant(table), origin, axis=0)


def track_origins(writer: TokenGraphBuilder, step: TokenStep, keep: ir.Value, before: ir.Value | None) -> ir.Value:
    """[B, N']: positions in the full stream of the tokens that a selecting step keeps. ``before``: positions of the
    tokens before the step; None: all."""
    front = writer.ints(*range(step.settings.leading))
    shape = writer.concat(0, writer.sizes(keep, 0), writer.ints(step.settings.leading))
    kept = writer.concat(1, writer.expand(writer.unsqueeze(front, 0), shape), keep) if step.settings.leading else keep
    return writer.gather_rows(before, kept) if before is not None else kept


def attention_scores(
    writer: TokenGraphBuilder,
    step: TokenStep,
    before: Sequence[TokenStep],
    values: Mapping[str, ir.Value],
    nodes: Mapping[str, ir.Node],
) -> ir.Value:
    """[B, N]: the attention that each token receives, summed over heads: from the class token; where the model reads no
    single token, from all tokens that are not masked."""
    scores = step.point.scores
    assert scores is not None
    weights = recompute_attention(writer, step, before, nodes[scores.fused]) if scores.fused else values[scores.tensor]
    if step.point.leading_reads and scores.fused:
        scores_of_tokens = writer.reduce_sum(weights, 1, 2)
    elif step.point.leading_reads:
        scores_of_tokens = writer.reduce_sum(
            separate_heads(writer, step, writer.gather_one(weights, scores.query_axis, 0), 1), 1
        )
    elif scores.masked or any(b.method.input_adaptive for b in before):
        scores_of_tokens = attention_received(
            writer, writer.reduce_sum(separate_heads(writer, step, weights, 2), 1), scores.query_axis
        )
    else:
        scores_of_tokens = writer.reduce_sum(
            separate_heads(writer, step, writer.reduce_sum(weights, scores.query_axis), 1), 1
        )
    return scores_of_tokens if writer.dtype == ir.DataType.FLOAT else writer.cast(scores_of_tokens, ir.DataType.FLOAT)


def separate_heads(writer: TokenGraphBuilder, step: TokenStep, weights: ir.Value, axes: int) -> ir.Value:
    """``weights`` as [B, H, ..] with so many token axes; split where batch and heads share an axis."""
    scores = step.point.scores
    assert scores is not None
    if scores.heads_on_own_axis:
        return weights
    if step.settings.share is None:
        return writer.reshape(weights, -1, scores.heads, *[step.settings.count] * axes)
    lengths = [writer.sizes(weights, -1)] * axes
    return writer.op(RESHAPE, weights, writer.concat(0, writer.ints(-1, scores.heads), *lengths))


def attention_received(writer: TokenGraphBuilder, weights: ir.Value, query_axis: int) -> ir.Value:
    """[B, N]: the attention that each token receives, of ``weights`` [B, N, N], from tokens that receive some.
    Masked tokens (padding) attend to others too, and are left out."""
    counted = writer.cast(writer.cast(writer.reduce_sum(weights, query_axis), ir.DataType.BOOL))
    if query_axis == -2:
        return writer.reduce_sum(writer.matmul(writer.unsqueeze(counted, 1), weights), 1)
    return writer.reduce_sum(writer.matmul(weights, writer.unsqueeze(counted, 2)), 2)


def recompute_attention(
    writer: TokenGraphBuilder, step: TokenStep, before: Sequence[TokenStep], node: ir.Node
) -> ir.Value:
    """The attention weights of a fused node, recomputed: [B, H, N, N], or [B, H, 1, N] of the class token where the
    model reads one."""
    form = ATTENTION_FORMS[node.domain, node.op_type]
    query, key = (node.inputs[k] for k in (form.query, form.key))
    assert query is not None and key is not None and step.point.scores is not None
    heads, width = step.point.scores.heads, step.point.scores.head_width
    only_first, flat = step.point.leading_reads > 0, not has_head_axis(node)
    query = writer.slice(query, 1 if flat else 2, 0, 1) if only_first else query
    if flat:  # [B, N, H * D] -> [B, H, N, D]
        query, key = (
            writer.op(TRANSPOSE, writer.reshape(value, 0, 0, heads, -1), perm=[0, 2, 1, 3]) for value in (query, key)
        )
    scale = node.attributes.get_float("scale", 0.0) or width**-0.5
    scaled = writer.op(MUL, query, writer.scalar(scale))
    weights = writer.matmul(scaled, writer.op(TRANSPOSE, key, perm=[0, 1, 3, 2]))
    weighed = any(b.method.weights_tokens for b in before)  # then log sizes were added to the mask
    if weighed or step.point.scores.mask:
        mask = node.inputs[form.scores or 0]
        assert mask is not None
        mask = writer.slice(mask, 2, 0, 1) if only_first else mask
        weights = apply_mask(writer, weights, mask, step.point.scores.mask == "tells" and not weighed)
    return writer.op(SOFTMAX, weights, axis=-1)
