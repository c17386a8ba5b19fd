"""MACs as a function of the token counts, without building the graph: the cost model of the schedule search."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph import ShapeFacts, contraction_sizes, count_macs, infer_graph, opset_version
from snpc.passes import Analysis
from snpc.passes.token_analysis import TOKEN_AXIS, TokenFlow, TokenPoint
from snpc.tokens.methods import StepSettings, TokenMethod


@dataclass(frozen=True)
class TokenCost:
    """MACs at ``count`` tokens, by how they scale.

    ``fixed``: independent of the tokens. ``after_point``: per point, MACs up to the next one of nodes with one token
    axis, and with two. ``width``: of the stream. ``scoring``: per point, MACs of the scores that a method reads, per
    token and per pair of tokens. ``blocks``: those of the points. ``behind_block``: per point, the part of
    ``after_point`` that lies behind the end of its block, where all tokens can be back.
    """

    fixed: float
    after_point: tuple[tuple[float, float], ...]
    count: int
    width: int
    scoring: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    behind_block: tuple[tuple[float, float], ...]

    def macs(self, settings: Sequence[StepSettings], method: TokenMethod, back: Collection[int] = ()) -> float:
        """MACs with these settings, one per point, with those of the method itself. ``back``: blocks at whose end all
        tokens are back."""
        total = self.fixed
        for index, (setting, (row, all_)) in enumerate(zip(settings, self.scoring, strict=True)):
            once, twice = self.after_point[index]
            share = (setting.count - setting.removed) / self.count
            total += once * share + twice * share**2
            if self.blocks[index] in back:
                once, twice = self.behind_block[index]
                total += once * (1 - share) + twice * (1 - share**2)
            if setting.removed:
                scoring = row * setting.count + all_ * setting.count**2 if method.needs_scores else 0
                total += method.macs(setting, self.width) + scoring
        return total


def token_cost(analysis: Analysis, facts: ShapeFacts) -> TokenCost:
    """The cost of a model whose tokens are not reduced; ``facts``: of its graph."""
    points = analysis.tokens.points
    graph, model = analysis.model.graph, analysis.traced_graph.model
    before, after = (infer_graph(m, dict(analysis.dim_sizes)) for m in (graph, model))
    originals = {str(node.name): node for node in graph.graph}
    names = [{node.name for node in point.flow.nodes} for point in points]
    after_point, behind_block = ([[0.0, 0.0] for _ in points] for _ in range(2))
    inside = [names_up_to_exit(point) for point in points]
    fixed = 0.0
    for node in model.graph:
        index = max((k for k, nodes_of_point in enumerate(names) if node.name in nodes_of_point), default=-1)
        for part, macs in macs_by_part(after, node, opset_version(model, node.domain)).items():
            axes = 0
            if index >= 0:
                original = originals[str(node.name)]
                whole = macs_by_part(before, original, opset_version(graph, node.domain))[part]
                axes = count_token_axes(points[index].flow, original, part) - (
                    2 * macs < whole
                )  # of rows that nobody reads, one
            if axes > 0:
                after_point[index][axes - 1] += macs
                if node.name not in inside[index]:
                    behind_block[index][axes - 1] += macs
            else:
                fixed += macs
    width = (facts.shape[points[0].stream] or (0,))[-1]
    scoring = tuple(scoring_macs(point, width) for point in points)
    count = (before.shape[points[0].stream] or (0, 0))[TOKEN_AXIS]
    behind = tuple((a, b) for a, b in behind_block)
    blocks = tuple(point.block for point in points)
    return TokenCost(fixed, tuple((a, b) for a, b in after_point), count, width, scoring, blocks, behind)


def names_up_to_exit(point: TokenPoint) -> set[str | None]:
    """Names of the nodes between a point and the end of its own block, where tokens can be back there."""
    own = point.exit_at(point.block)
    return {node.name for node in own.flow.nodes} if own is not None else set()


def scoring_macs(point: TokenPoint, width: int) -> tuple[int, int]:
    """MACs of the attention scores that a method reads: per token, and per pair of tokens."""
    again = width if point.scores is not None and point.scores.fused else 0  # scores are computed again
    if point.leading_reads:
        return again, 0
    return 0, again + (point.scores is not None and point.scores.masked)


def macs_by_part(facts: ShapeFacts, node: ir.Node, version: int) -> dict[str, int]:
    return {part: count_macs(sizes) for part, _, sizes in contraction_sizes(facts.call(node, version), node.domain)}


def count_token_axes(flow: TokenFlow, node: ir.Node, part: str) -> int:
    """The number of token axes of a node: two for scores and contexts."""
    if part in ("scores", "context"):
        return 2
    marked = [flow.axes[v] for v in (*node.inputs, *node.outputs[:1]) if v is not None and v in flow.axes]
    return max((len(marks.axes) for marks in marked), default=0)
