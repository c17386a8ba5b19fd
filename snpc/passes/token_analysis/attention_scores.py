"""Attention scores: the weights of the attention in front of a reduction point, which say how much a token is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from snpc.graph import ShapeFacts, opset_version
from snpc.ops import attention_form, head_counts, lookup
from snpc.passes.token_analysis.propagate import follow_tokens
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenFlow, TokenGraph


@dataclass(frozen=True)
class AttentionScores:
    """Attention weights of the block in front of a reduction point.

    ``tensor``: the value that holds them, with queries along ``query_axis`` (-1 or -2) and keys along the other of the
    two axes. In a fused node (``fused`` is its name) they are computed inside, with heads of ``head_width`` channels;
    its ``mask`` is boolean ("tells") or added to the scores ("added"). ``heads_on_own_axis``: heads are the second
    axis. ``masked``: a mask applies to the scores.
    """

    tensor: str
    query_axis: int
    heads: int
    head_width: int = 0
    fused: str = ""
    mask: Literal["", "tells", "added"] = ""
    heads_on_own_axis: bool = False
    masked: bool = False


def attention_scores_of(
    graph: TokenGraph, site: ir.Node, node: ir.Node, end: ir.Value | None = None
) -> AttentionScores | None:
    """The weights of attention ``site``, if they are over the tokens of the residual sum ``node``; None otherwise.
    ``end``: nothing behind it has to be followed."""
    out, facts = node.outputs[0], graph.facts
    for operand in node.inputs:
        if operand is None or facts.shape.get(operand) != facts.shape.get(out):
            continue
        flow = follow_tokens(graph, operand, TOKEN_AXIS, end)
        if out in flow.axes:
            batch = (facts.shape[out] or (1,))[0]
            fused = lookup(site.domain, site.op_type).kind == "attention"
            scores = (
                fused_attention_scores(facts, flow, site, opset_version(graph.model))
                if fused
                else unfused_attention_scores(facts, flow, site, batch)
            )
            if scores is not None:
                return scores
    return None


def unfused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, batch: int) -> AttentionScores | None:
    """Attention weights of a softmax node: [batch, heads, queries, keys], with batch and heads on one axis or more."""
    out = site.outputs[0]
    marks, shape = flow.axes.get(out), facts.shape.get(out) or ()
    keys = {w.axis for w in flow.softmaxes if w.node is site}
    last = len(shape) - 1
    if marks is None or set(marks.axes) != {last - 1, last} or any(marks.axes.values()) or len(keys) != 1:
        return None
    heads = math.prod(shape[:-2])
    if heads % batch:
        return None
    heads_on_own_axis = last == 3 and shape[0] == batch
    masked = any(not side.uniform for side in flow.side_inputs)
    return AttentionScores(
        str(out.name),
        (marks.axes.keys() - keys).pop() - len(shape),
        heads // batch,
        heads_on_own_axis=heads_on_own_axis,
        masked=masked,
    )


def fused_attention_scores(facts: ShapeFacts, flow: TokenFlow, site: ir.Node, version: int) -> AttentionScores | None:
    """The scores inside a fused attention node; None where they cannot be computed outside."""
    call = facts.call(site, version)
    shape = attention_form(call, site.domain)
    if shape.packed or any(site.inputs[k] not in flow.axes for k in (shape.query, shape.key)):
        return None
    if call.has(shape.bias) if shape.bias is not None else False:
        return None  # the bias of the projection is added inside the node
    mask: Literal["", "tells", "added"] = ""
    mask_value = site.inputs[shape.scores] if shape.scores is not None and call.has(shape.scores) else None
    if mask_value is not None:
        mask = "tells" if facts.dtype.get(mask_value) == ir.DataType.BOOL else "added"
    heads, kv_heads = head_counts(call)
    query_shape, key_shape = call.shape(shape.query), call.shape(shape.key)
    split_into_heads = not heads
    if split_into_heads:
        heads, kv_heads = query_shape[1], key_shape[1]
    if heads != kv_heads or not (split_into_heads or len(query_shape) == 3):
        return None
    width = query_shape[-1] if split_into_heads else query_shape[-1] // heads
    return AttentionScores("", -2, heads, width, str(site.name), mask, heads_on_own_axis=True, masked=bool(mask))
