"""Spans: stretches of blocks in which tokens can be merged where all of them have to be back behind (dense outputs).

What is returned for every token (features, a segmentation, a depth map) needs all tokens, but the blocks in front of
it do not: tokens are merged at a reduction point and are back at an exit, the end of a block. All that lies between the
two has to work per token or attend to all tokens, and nothing may read merged tokens past the exit.

The stream is cut into segments, from the sum behind an attention to the end of its block, and on to the next such sum.
A span is a chain of segments, so that a deep model is followed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph import ancestor_nodes
from snpc.passes.token_analysis.attention_scores import attention_scores_of
from snpc.passes.token_analysis.points import (
    PointSearch,
    TokenExit,
    TokenPoint,
    find_staying_tokens,
    input_batch_size,
    is_residual_sum,
)
from snpc.passes.token_analysis.propagate import BYPASS, follow_tokens
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenFlow, TokenPin

TEXT = "the tokens are those of a text, and the outputs need all"


@dataclass(frozen=True)
class AttentionBlock:
    """Attention ``number`` (from 1), its softmax or fused node ``site``, and the nodes up to the next one."""

    number: int
    site: ir.Node
    nodes: Sequence[ir.Node]


@dataclass(frozen=True)
class BlockSegment:
    """The part of a block behind its attention: from ``start``, the sum that adds it, to ``end``. ``flow`` is None
    where the two are one value."""

    block: AttentionBlock
    start: ir.Value
    end: ir.Value
    flow: TokenFlow | None


def find_span_points(
    search: PointSearch, blocks: Sequence[AttentionBlock]
) -> tuple[list[TokenPoint], Mapping[int, TokenPin]]:
    """The reduction points that have an exit, and why other blocks have none, where more is known than that the outputs
    need all tokens."""
    segments: dict[int, BlockSegment] = {}
    pins: dict[int, TokenPin] = {}
    for block in blocks:
        found = segment_of(search, block)
        if isinstance(found, BlockSegment):
            segments[block.number] = found
        elif found is not None:
            pins[block.number] = found
    links: dict[int, TokenFlow] = {}
    for number, segment in segments.items():
        if number + 1 in segments:
            flow = link_flow(search, segment.end, segments[number + 1].start)
            if flow.pin is None:
                links[number] = flow
            elif segment.flow is None:
                pins[number] = flow.pin
    points = []
    for number, segment in segments.items():
        exits = exits_of(segments, links, number)
        point = span_point(search, segment, exits) if exits else None
        if isinstance(point, TokenPoint):
            points.append(point)
        elif point is not None:
            pins[number] = point
    return points, pins


def segment_of(search: PointSearch, block: AttentionBlock) -> BlockSegment | TokenPin | None:
    """The segment of a block; the pin that says why it has none; None where it has no residual sum."""
    facts = search.graph.facts
    sums = [n.outputs[0] for n in block.nodes if is_residual_sum(facts, search.graph.data_dependent, n)]
    if not sums or (facts.shape[sums[0]] or (None,))[0] != input_batch_size(search.graph.model, facts):
        return None
    start, first_pin = sums[0], None
    if reads_ids(search, start):
        return TokenPin(start.producer(), str(start.name), TEXT)
    for end in reversed(sums[1:]):
        if facts.shape[end] != facts.shape[start]:
            continue
        flow = closed_flow(search, start, end)
        if flow.pin is None:
            return BlockSegment(block, start, end, flow)
        if first_pin is None or first_pin.reason == BYPASS:
            first_pin = flow.pin
    return first_pin if first_pin is not None else BlockSegment(block, start, start, None)


def reads_ids(search: PointSearch, value: ir.Value) -> bool:
    """Is ``value`` computed from token ids, an integer input [batch, tokens]? Merging would mix words, and in a decoder
    let a token see those that follow."""
    facts = search.graph.facts
    ids = {
        v
        for v in search.graph.model.graph.inputs
        if facts.dtype.get(v) in (ir.DataType.INT32, ir.DataType.INT64) and len(facts.shape.get(v) or ()) == 2
    }
    return any(not ids.isdisjoint(node.inputs) for node in ancestor_nodes(value))


def closed_flow(search: PointSearch, start: ir.Value, end: ir.Value) -> TokenFlow:
    """The tokens of ``start``, followed up to ``end``; pinned where they do not all get there."""
    flow = follow_tokens(search.graph, start, TOKEN_AXIS, end)
    table = next((side for side in flow.side_inputs if not side.uniform), None)
    reached = flow.axes.get(end)
    if flow.pin is None and table is not None:
        reason = f"tokens are combined with {table.name}, which has an entry for every position"
        flow.pin = TokenPin(table.node, table.name, reason)
    elif flow.pin is None and (reached is None or reached.axes != {TOKEN_AXIS: 0}):
        flow.pin = TokenPin(end.producer(), str(end.name), "it is not computed from all tokens")
    return flow


def link_flow(search: PointSearch, start: ir.Value, end: ir.Value) -> TokenFlow:
    """The tokens between two segments of one span: neither of the two values is returned."""
    flow = closed_flow(search, start, end)
    for value in (start, end):
        if value.is_graph_output():
            reason = f"graph output {value.name} has all tokens"
            flow.pin = flow.pin or TokenPin(value.producer(), str(value.name), reason)
    return flow


def exits_of(
    segments: Mapping[int, BlockSegment], links: Mapping[int, TokenFlow], number: int
) -> tuple[TokenExit, ...]:
    """The ends of blocks that the tokens behind attention ``number`` all get to."""
    exits: list[TokenExit] = []
    flows: list[TokenFlow] = []
    block = number
    while block in segments:
        segment = segments[block]
        flows += [segment.flow] if segment.flow is not None else []
        if flows:
            exits.append(TokenExit(block, segment.end, tuple(flows)))
        if block not in links:
            break
        flows.append(links[block])
        block += 1
    return tuple(exits)


def span_point(search: PointSearch, segment: BlockSegment, exits: tuple[TokenExit, ...]) -> TokenPoint | TokenPin:
    """The reduction point at the start of ``segment``, or why there is none."""
    graph = search.graph
    value, flow = segment.start, exits[-1].flow
    count = (graph.facts.shape[value] or (0, 0))[TOKEN_AXIS]
    try:
        leading, protected = find_staying_tokens(search, value, flow.read_positions)
    except TokenPin as pin:
        return pin
    producer = value.producer()
    assert producer is not None
    scores = attention_scores_of(graph, segment.block.site, producer, value)
    return TokenPoint(
        segment.block.number,
        str(value.name),
        count,
        leading,
        len(flow.read_positions),
        bool(flow.means),
        search.fixed(value),
        "",
        scores,
        value,
        flow,
        exits,
        segment.block.number / search.blocks,
        protected,
    )
