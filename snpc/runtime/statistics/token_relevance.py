"""How much each token matters for the outputs, from calibration data: relevance propagated backwards through the graph.

Layer-wise relevance propagation: what an output is made of is handed back to its inputs in proportion to their share,
node by node, so that none is lost. Linear maps hand back by positive contributions (the z+ rule; Montavon et al. 2017,
arXiv 1512.02479, eq. 17), sums by magnitude, what works on single positions and normalisations as it is; attention
weights count as given, so that contexts hand back to the values (Ali et al. 2022, arXiv 2202.07304).
``snpc.torch.operators.relevance`` is another implementation, as gradient times input, for units; tests compare the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph.binding import dynamic_axes
from snpc.graph.shapes import ShapeFacts, has_subgraphs, infer_graph, is_float, opset_version
from snpc.graph.traversal import used_values
from snpc.ops import lookup
from snpc.ops.attention import attention_form, head_counts
from snpc.ops.spec import Blocked, OpCall, OpSpec
from snpc.passes.token_analysis.reduction_points import TokenPoint
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.types import AnyArray, Feeds, FloatArray

RELEVANCE_EPSILON = 1e-12
RELEVANCE_SAMPLES = 16
RELEVANCE_DIGITS = 6  # of the scores that are kept: they stand in plans


def measure_token_relevance(
    model: ir.Model, points: Sequence[TokenPoint], batches: Iterable[Feeds], execution: Execution = DEFAULT_EXECUTION
) -> dict[int, tuple[float, ...]]:
    """block -> [tokens]: the share of the outputs' relevance that each position of the stream has behind that block,
    averaged over the samples of ``batches``; of every output the largest entry of each sample is asked about.

    Raises UserError where an operator on the way back has no rule.
    """
    if not points:
        return {}
    watched = downstream_values(model, points[0].value)
    shown = model.clone()
    names = [str(v.name) for v in watched]
    values = {str(v.name): v for node in shown.graph for v in node.outputs} | {
        str(v.name): v for v in shown.graph.inputs
    }
    shown.graph.outputs.clear()
    shown.graph.outputs.extend(values[name] for name in names)
    sums = {point.block: np.zeros(point.count) for point in points}
    count = 0
    with temporary_session(shown, execution=execution, optimise="basic", memory="least") as run:
        for feeds in itertools.islice(single_samples(model, batches), RELEVANCE_SAMPLES):
            facts = infer_graph(model, feed_dim_sizes(model, feeds))
            held = dict(zip(watched, run(feeds).values(), strict=True))
            found = RelevancePropagation(model, facts, held, {p.value for p in points}).run()
            for point in points:
                total = found[point.value].sum(-1)
                sums[point.block] += (total / np.maximum(total.sum(1, keepdims=True), RELEVANCE_EPSILON)).sum(0)
            count += len(next(iter(feeds.values())))
    return {block: round_scores(total / count) for block, total in sums.items()}


def round_scores(scores: FloatArray) -> tuple[float, ...]:
    return tuple(float(f"{s:.{RELEVANCE_DIGITS}g}") for s in scores)


def single_samples(model: ir.Model, batches: Iterable[Feeds]) -> Iterator[Feeds]:
    """Sample by sample where the batch is dynamic, to hold fewer activations."""
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    if any(v.shape is None or not len(v.shape) or isinstance(v.shape[0], int) for v in inputs):
        yield from batches
        return
    for feeds in batches:
        for k in range(len(next(iter(feeds.values())))):
            yield {name: array[k : k + 1] for name, array in feeds.items()}


def feed_dim_sizes(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    return {dim: feeds[name].shape[axis] for dim, name, axis, _ in dynamic_axes(model.graph) if name in feeds}


def downstream_values(model: ir.Model, value: str) -> list[ir.Value]:
    """Floats that are read or made between ``value`` and the outputs, but for constants."""
    found: dict[ir.Value, None] = {}
    behind = {next(v for node in model.graph for v in node.outputs if v.name == value)}
    for node in model.graph:
        if any(v in behind for v in used_values(node)):
            behind.update(node.outputs)
            found |= {v: None for v in (*used_values(node), *node.outputs) if v.const_value is None and v.name}
    return list(found)


class RelevancePropagation:
    """One pass from the outputs back to ``wanted`` values. ``held``: contents of values."""

    def __init__(self, model: ir.Model, facts: ShapeFacts, held: Mapping[ir.Value, AnyArray], wanted: set[str]) -> None:
        self.model, self.facts, self.held, self.wanted = model, facts, held, wanted
        self.left: dict[ir.Value, FloatArray] = {}
        self.shares = attention_weight_values(model)

    def run(self) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        for value in self.model.graph.outputs:
            if value in self.held and is_float(self.facts.dtype.get(value)):
                self.give(value, seed_relevance(self.array(value)))
        behind = set(self.held)
        for node in reversed(list(self.model.graph)):
            relevance = [self.left.pop(v, None) for v in node.outputs]
            for value, mine in zip(node.outputs, relevance, strict=True):
                if mine is not None and value.name in self.wanted:
                    found[str(value.name)] = mine
            if len(found) == len(self.wanted):
                break
            if all(mine is None for mine in relevance) or not any(v in behind for v in used_values(node)):
                continue
            if has_subgraphs(node):
                raise no_relevance_rule(node, "control flow")
            self.hand_back(node, relevance)
        return {name: found.get(name, np.zeros(self.shape(name))) for name in self.wanted}

    def shape(self, name: str) -> tuple[int, ...]:
        return next(a.shape for v, a in self.held.items() if v.name == name)

    def array(self, value: ir.Value | None) -> FloatArray:
        assert value is not None
        found = self.held[value] if value in self.held else value.const_value.numpy()  # type: ignore[union-attr]
        return np.asarray(found, np.float64)

    def give(self, value: ir.Value | None, relevance: FloatArray) -> None:
        if value is None or value not in self.held:
            return
        self.left[value] = self.left[value] + relevance if value in self.left else relevance

    def hand_back(self, node: ir.Node, relevance: Sequence[FloatArray | None]) -> None:
        spec = lookup(node.domain, node.op_type)
        call = self.facts.call(node, opset_version(self.model, node.domain))
        given = [np.zeros(call.out_shapes[k]) if r is None else r for k, r in enumerate(relevance)]
        RELEVANCE_RULES[spec.kind](self, node, spec, call, given)


def seed_relevance(output: FloatArray) -> FloatArray:
    """One at the largest entry of each sample."""
    flat = output.reshape(len(output), -1)
    return np.asarray(np.eye(flat.shape[1])[flat.argmax(1)].reshape(output.shape))


def attention_weight_values(model: ir.Model) -> set[ir.Value]:
    """Attention weights: shares that add up to 1, wherever they were moved to."""
    found: set[ir.Value] = set()
    for node in model.graph:
        spec = lookup(node.domain, node.op_type)
        carried = spec.kind == "movement" or (spec.kind == "pointwise" and spec.effect == "same")
        if spec.makes_shares or (carried and node.inputs and node.inputs[0] in found):
            found.add(node.outputs[0])
    return found


def no_relevance_rule(node: ir.Node, reason: str) -> UserError:
    return UserError(f"{node.op_type} {node.name}: relevance cannot be propagated through it ({reason}); use topk")


# -- rules -----------------------------------------------------------------------------------------------------------


def relevance_pointwise(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    """To the operands that vary as the output does: biases, gains and statistics count as given."""
    total = given[0]
    full = [
        v for k, v in enumerate(node.inputs) if v is not None and v in back.held and call.shape(k) == call.out_shapes[0]
    ]
    full = [v for v in full if is_float(back.facts.dtype.get(v))]
    if spec.divides:
        full = full[:1]
    if spec.effect == "add":
        share_by_magnitude(back, full, total)
        return
    for value in full:
        back.give(value, total / len(full))


def share_by_magnitude(back: RelevancePropagation, values: Sequence[ir.Value], total: FloatArray) -> None:
    if len(values) == 1:
        back.give(values[0], total)
        return
    sizes = [np.abs(back.array(v)) for v in values]
    whole = np.maximum(sum(sizes[1:], sizes[0]), RELEVANCE_EPSILON)
    for value, size in zip(values, sizes, strict=True):
        back.give(value, total * size / whole)


def relevance_normalize(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    total = given[0] + sum((given[k] for k in spec.sum_outputs if k < len(given)), np.zeros(()))
    share_by_magnitude(back, [v for k in spec.data or (0,) if (v := node.inputs[k]) is not None], total)


def relevance_reduce(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    assert spec.axes is not None
    axes = spec.axes(call)
    total = given[0]
    if len(call.out_shapes[0]) != len(call.shape(0)):
        total = np.expand_dims(total, axes)
    size = np.abs(back.array(node.inputs[0]))
    back.give(node.inputs[0], total * size / np.maximum(size.sum(axes, keepdims=True), RELEVANCE_EPSILON))


def relevance_movement(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    assert spec.move is not None
    shape = call.shape(0)
    size = int(np.prod(shape, dtype=np.int64))
    try:
        places = spec.move(call, np.arange(size, dtype=np.int32).reshape(shape))
    except Blocked as block:
        raise no_relevance_rule(node, block.reason) from None
    total = np.zeros(size)
    for place, mine in zip(places, given, strict=False):
        at, flat = np.broadcast_to(place, mine.shape).reshape(-1), mine.reshape(-1)
        total += np.bincount(at[at >= 0], flat[at >= 0], size)
    back.give(node.inputs[0], total.reshape(shape))


def relevance_concat(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    axis = int(call.attrs["axis"]) % len(call.out_shapes[0])
    ends = np.cumsum([call.shape(k)[axis] for k in range(len(call.shapes))])[:-1]
    for value, part in zip(node.inputs, np.split(given[0], ends, axis), strict=True):
        back.give(value, part)


def relevance_contraction(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    assert spec.letters is not None
    try:
        letters = spec.letters(call)
    except Blocked as block:
        raise no_relevance_rule(node, block.reason) from None
    if letters.windowed:
        raise no_relevance_rule(node, "it sees tokens through a window")
    values = [node.inputs[k] for k in spec.operands]
    made = [v in back.held and v not in back.shares for v in values]
    if sum(made) != 1:
        raise no_relevance_rule(node, "a product of two activations that is no attention")
    one = made.index(True)
    mine, other = (letters.left, letters.right) if one == 0 else (letters.right, letters.left)
    back.give(
        values[one], z_plus(back.array(values[one]), back.array(values[1 - one]), mine, other, letters.out, given[0])
    )


def z_plus(x: FloatArray, w: FloatArray, mine: str, other: str, out: str, total: FloatArray) -> FloatArray:
    """Of each output its relevance, shared among the positive products x * w that it is a sum of; by size among all of
    them where none is positive."""
    shape = x.shape
    (x, mine), (w, other), (total, out) = squeeze_term(x, mine), squeeze_term(w, other), squeeze_term(total, out)
    forward, backward = f"{mine},{other}->{out}", f"{out},{other}->{mine}"

    def made(a: FloatArray, b: FloatArray) -> FloatArray:
        return np.asarray(np.einsum(forward, a, b, optimize=True))

    def shared(a: FloatArray, b: FloatArray, share: FloatArray) -> FloatArray:
        return np.asarray(a * np.einsum(backward, share, b, optimize=True))

    up, down = (np.maximum(x, 0), np.maximum(w, 0)), (np.minimum(x, 0), np.minimum(w, 0))
    positive = made(*up) + made(*down)
    none = positive <= RELEVANCE_EPSILON
    share = np.where(none, 0.0, total / np.maximum(positive, RELEVANCE_EPSILON))
    found = shared(*up, share) + shared(*down, share)
    if none.any():
        size = np.abs(x), np.abs(w)
        found = found + shared(*size, np.where(none, total / np.maximum(made(*size), RELEVANCE_EPSILON), 0.0))
    return found.reshape(shape)


def squeeze_term(array: FloatArray, term: str) -> tuple[FloatArray, str]:
    """Without axes of size 1, which may meet longer ones."""
    keep = "".join(letter for letter, size in zip(term, array.shape, strict=True) if size > 1)
    return np.squeeze(array), keep


def relevance_attention(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    """Of a fused node the weights are computed again."""
    shape = attention_form(call, node.domain)
    extras = [k for k in (shape.scores, *shape.past, *shape.rotary, *shape.others(call)) if k is not None]
    if shape.packed or any(call.has(k) for k in extras):
        raise no_relevance_rule(node, "it holds its projections, or takes a mask or a cache")
    if call.attrs.get("is_causal") or call.attrs.get("unidirectional"):
        raise no_relevance_rule(node, "it hides later tokens")
    if shape.bias is not None and call.has(shape.bias):
        raise no_relevance_rule(node, "it adds a bias inside")
    heads, _ = head_counts(call)
    query, key, value = (back.array(node.inputs[k]) for k in (shape.query, shape.key, shape.value))

    def split(x: FloatArray) -> FloatArray:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) if heads else x

    q, k, v, total = (split(x) for x in (query, key, value, given[0]))
    if k.shape[1] != q.shape[1]:
        raise no_relevance_rule(node, "heads share keys")
    scale = float(call.attrs.get("scale") or 0) or q.shape[-1] ** -0.5
    scores = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    found = z_plus(v, weights, "bhkd", "bhqk", "bhqd", total)
    back.give(node.inputs[shape.value], found.transpose(0, 2, 1, 3).reshape(value.shape) if heads else found)


def relevance_shape(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    """Shapes are no matter of relevance."""


def relevance_opaque(
    back: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, given: Sequence[FloatArray]
) -> None:
    raise no_relevance_rule(node, spec.reason)


RELEVANCE_RULES: Mapping[str, Callable[[RelevancePropagation, ir.Node, OpSpec, OpCall, Sequence[FloatArray]], None]] = {
    "pointwise": relevance_pointwise,
    "normalise": relevance_normalize,
    "reduce": relevance_reduce,
    "movement": relevance_movement,
    "concat": relevance_concat,
    "contraction": relevance_contraction,
    "attention": relevance_attention,
    "shape": relevance_shape,
    "opaque": relevance_opaque,
}
