"""The oracle of token reduction: the same reduction in the graph at full length.

After a point every token is replaced by the token that it became part of (an average, for merged ones), with weight 1/s
in attention where s tokens did: s copies that count 1/s each equal one token. Dropped tokens have weight 0. The outputs
must equal those of the graph with fewer tokens. Where all tokens are back, each either stays what it is (copies) or
is what it was before plus what was added to the token that it became part of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts
from snpc.ops import ADD, SUB
from snpc.tokens.open import MergedStream, apply_token_sizes, batch_dimension, replace_exits, stream_dtype
from snpc.tokens.protected import new_order
from snpc.tokens.step import TokenStep
from snpc.tokens.writer import TokenGraphBuilder
from snpc.types import AnyArray, FloatArray


def full_length_oracle(model: ir.Model, facts: ShapeFacts, steps: Sequence[TokenStep]) -> ir.Model:
    """A copy of ``model`` with two more inputs per step: ``*_become`` [B, N, N], each token as a weighted sum of all,
    and ``*_count`` [B, N, 1], its weight in attention."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    batch = batch_dimension(model)
    counts = []
    merged: list[MergedStream] = []
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
        replaced = writer.matmul(become, stream)
        for node, index in uses:
            node.replace_input_with(index, replaced)
        counts.append(weight)
        if step.exit is not None:
            merged.append(MergedStream(step, writer, stream, replaced, []))
    replace_exits(copy, merged, values, add_back_details)
    for k, step in enumerate(steps):
        apply_token_sizes(copy, facts, step, counts[k], later=steps[k + 1 :])
    copy.graph.sort()
    return copy


def add_back_details(merged: MergedStream, values: ir.Value) -> ir.Value:
    """What set each token apart from the one that it became part of, added to the stream; copies stay as they are."""
    if merged.step.unmerge is None or merged.step.unmerge.form == "copy":
        return values
    details = merged.writer.op(SUB, merged.before, merged.after)
    return merged.writer.op(ADD, values, details)


def token_membership(steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int) -> Iterator[FloatArray]:
    """After each step [B, tokens left, ``count`` tokens at first], 1 where a token became part of one that is left."""
    for _, holds, _ in replay_decisions(steps, decided, count):
        yield holds


def replay_decisions(
    steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """After each step: each token as a weighted sum of the first ones, [B, count, count]; membership, [B, tokens left,
    count]; sizes, [B, tokens left]."""
    batch = len(next(iter(decided.values())))
    holds: FloatArray = np.tile(np.eye(count), (batch, 1, 1))
    sizes: FloatArray = np.ones((batch, count))
    for number, step in enumerate(steps):
        if number and not step.follows(steps[number - 1]):
            holds, sizes = np.tile(np.eye(count), (batch, 1, 1)), np.ones((batch, count))
        arrays = [decided[name] for name in step.names]
        setting = replace(step.settings, count=holds.shape[1])
        order = new_order(setting)
        matrix, sizes = step.method.matrix(setting, arrays, sizes[:, order])
        matrix = matrix[:, :, np.argsort(order)]
        averaged = holds / np.maximum(holds.sum(2, keepdims=True), 1)  # a token as the average of its equal copies
        holds = ((matrix > 0).astype(float) @ holds > 0).astype(float)
        yield holds.transpose(0, 2, 1) @ (matrix @ averaged), holds, sizes


def oracle_feeds(steps: Sequence[TokenStep], decided: Mapping[str, AnyArray], count: int) -> dict[str, AnyArray]:
    """The inputs that ``full_length_oracle`` adds, for the decisions of one batch of ``count`` tokens."""
    feeds: dict[str, AnyArray] = {}
    for step, (become, holds, sizes) in zip(steps, replay_decisions(steps, decided, count), strict=True):
        feeds[f"{step.prefix}_become"] = become.astype(np.float32)
        copies = np.maximum(holds.sum(2), 1)
        feeds[f"{step.prefix}_count"] = np.einsum("bij,bi->bj", holds, sizes / copies)[..., None].astype(np.float32)
    return feeds
