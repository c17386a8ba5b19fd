"""The oracle: the same reduction in the graph at its full number of tokens.

Behind a point every token is replaced by what became of it (the average that it was merged into, say), and it counts in
attention for the share that it is of that: s copies of a token that each count 1/s are as good as one. What was dropped
counts nothing. The outputs must be those of the graph with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts
from snpc.tokens.open import apply_token_sizes, batch_dimension, stream_dtype
from snpc.tokens.step import TokenStep
from snpc.tokens.writer import TokenGraphBuilder
from snpc.types import AnyArray, FloatArray


def full_length_oracle(model: ir.Model, facts: ShapeFacts, steps: Sequence[TokenStep]) -> ir.Model:
    """A copy of ``model`` with two more inputs per step: ``*_become`` [B, N, N], what each token becomes as a sum of
    all, and ``*_count`` [B, N, 1], what it counts."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    batch = batch_dimension(model)
    counts = []
    for step in steps:
        dtype = stream_dtype(facts, step.point)
        writer = TokenGraphBuilder(copy.graph, step.prefix, dtype)
        stream = values[step.point.value]
        uses = list(stream.uses())
        count = step.point.count if step.point.fixed_length else f"{step.prefix}_of"
        become, weight = (
            ir.Value(name=f"{step.prefix}_{name}", shape=ir.Shape([batch, count, last]), type=ir.TensorType(dtype))
            for name, last in (("become", count), ("count", 1))
        )
        copy.graph.inputs.extend([become, weight])
        made = writer.matmul(become, stream)
        for node, index in uses:
            node.replace_input_with(index, made)
        counts.append(weight)
    for k, step in enumerate(steps):
        apply_token_sizes(copy, facts, step, counts[k], later=steps[k + 1 :])
    copy.graph.sort()
    return copy


def token_membership(steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int) -> Iterator[FloatArray]:
    """Behind each step [B, tokens now, tokens at first] of zeros and ones: which are in which. ``count``: tokens at
    first."""
    for _, holds, _ in replay_decisions(steps, decided, count):
        yield holds


def replay_decisions(
    steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """Behind each step: what each token becomes, [B, tokens at first, tokens at first]; members; sizes [B, tokens
    now]."""
    batch = len(next(iter(decided.values())))
    holds: FloatArray = np.tile(np.eye(count), (batch, 1, 1))
    sizes: FloatArray = np.ones((batch, count))
    for step in steps:
        arrays = [decided[name] for name in step.names]
        setting = replace(step.settings, count=holds.shape[1])
        matrix, sizes = step.method.matrix(setting, arrays, sizes)
        averaged = holds / np.maximum(holds.sum(2, keepdims=True), 1)  # a token as the average of its equal copies
        holds = ((matrix > 0).astype(float) @ holds > 0).astype(float)
        yield holds.transpose(0, 2, 1) @ (matrix @ averaged), holds, sizes


def oracle_feeds(steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int) -> dict[str, AnyArray]:
    """The inputs that ``full_length_oracle`` adds, from the decisions of one batch of ``count`` tokens."""
    feeds: dict[str, AnyArray] = {}
    for step, (become, holds, sizes) in zip(steps, replay_decisions(steps, decided, count), strict=True):
        feeds[f"{step.prefix}_become"] = become.astype(np.float32)
        copies = np.maximum(holds.sum(2), 1)
        feeds[f"{step.prefix}_count"] = np.einsum("bij,bi->bj", holds, sizes / copies)[..., None].astype(np.float32)
    return feeds
