"""Relevance of each token for the outputs, by layer-wise relevance propagation (LRP) on calibration data.

LRP walks from the outputs back through the graph and distributes the relevance of each node's output over its inputs,
so that the total stays the same. Rules: linear maps by positive contributions (z+; Montavon et al. 2017,
arXiv 1512.02479, eq. 17); sums by magnitude; functions of single positions and normalizations pass it on unchanged.
Attention weights are constants, so that contexts pass their relevance to the values (Ali et al. 2022,
arXiv 2202.07304). ``snpc.torch.operators.relevance`` is another implementation, of units and by gradient times input;
tests compare the two where their rules are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import ShapeFacts, dynamic_axes, has_subgraphs, infer_graph, is_float, opset_version, used_values
from snpc.ops import Blocked, OpCall, OpSpec, attention_form, head_counts, lookup
from snpc.passes.token_analysis import TokenPoint
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.types import AnyArray, Feeds, FloatArray

RELEVANCE_EPSILON = 1e-12
RELEVANCE_SAMPLES = 16
RELEVANCE_DIGITS = 6  # significant digits of the scores, which are written to plans


def measure_token_relevance(
    model: ir.Model, points: Sequence[TokenPoint], batches: Iterable[Feeds], execution: Execution = DEFAULT_EXECUTION
) -> dict[int, tuple[float, ...]]:
    """Block -> [tokens]: the share of the outputs' relevance at each position of the token stream behind that block,
    averaged over up to ``RELEVANCE_SAMPLES`` samples. Relevance starts at the largest entry of every output.

    Raises UserError where an operator between the stream and the outputs has no rule.
    """
    if not points:
        return {}
    downstream = downstream_values(model, points[0].value)
    probed = model.clone()
    values = {str(v.name): v for node in probed.graph for v in node.outputs}
    values |= {str(v.name): v for v in probed.graph.inputs}
    probed.graph.outputs.clear()
    probed.graph.outputs.extend(values[str(value.name)] for value in downstream)
    sums = {point.block: np.zeros(point.count) for point in points}
    count = 0
    with temporary_session(probed, execution=execution, optimization="basic", memory="least") as run:
        for feeds in itertools.islice(single_samples(model, batches), RELEVANCE_SAMPLES):
            facts = infer_graph(model, feed_dim_sizes(model, feeds))
            contents = dict(zip(downstream, run(feeds).values(), strict=True))
            relevance = RelevancePropagation(model, facts, contents, {point.value for point in points}).run()
            for point in points:
                total = relevance[point.value].sum(-1)
                sums[point.block] += (total / np.maximum(total.sum(1, keepdims=True), RELEVANCE_EPSILON)).sum(0)
            count += len(next(iter(feeds.values())))
    return {block: round_scores(total / count) for block, total in sums.items()}


def round_scores(scores: FloatArray) -> tuple[float, ...]:
    return tuple(float(f"{s:.{RELEVANCE_DIGITS}g}") for s in scores)


def single_samples(model: ir.Model, batches: Iterable[Feeds]) -> Iterator[Feeds]:
    """Batches of one sample where the batch size is dynamic, so that fewer activations are in memory."""
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    if any(v.shape is None or not len(v.shape) or isinstance(v.shape[0], int) for v in inputs):
        yield from batches
        return
    for feeds in batches:
        for k in range(len(next(iter(feeds.values())))):
            yield {name: array[k : k + 1] for name, array in feeds.items()}


def feed_dim_sizes(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    """Sizes of the dynamic dimensions in these feeds."""
    return {dim: feeds[name].shape[axis] for dim, name, axis, _ in dynamic_axes(model.graph) if name in feeds}


def downstream_values(model: ir.Model, value: str) -> list[ir.Value]:
    """Values that nodes behind ``value`` read or produce, except constants; in the order of the graph."""
    values: dict[ir.Value, None] = {}
    behind = {next(v for node in model.graph for v in node.outputs if v.name == value)}
    for node in model.graph:
        if any(v in behind for v in used_values(node)):
            behind.update(node.outputs)
            values |= {v: None for v in (*used_values(node), *node.outputs) if v.const_value is None and v.name}
    return list(values)


class RelevancePropagation:
    """One pass from the outputs back to the values named ``targets``.

    ``contents``: the arrays of the values on the way. ``pending``: relevance of values whose producer comes next.
    """

    def __init__(
        self, model: ir.Model, facts: ShapeFacts, contents: Mapping[ir.Value, AnyArray], targets: set[str]
    ) -> None:
        self.model, self.facts, self.contents, self.targets = model, facts, contents, targets
        self.pending: dict[ir.Value, FloatArray] = {}
        self.attention_weights = attention_weight_values(model)

    def run(self) -> dict[str, FloatArray]:
        """Target -> relevance in the shape of the target."""
        reached: dict[str, FloatArray] = {}
        for value in self.model.graph.outputs:
            if value in self.contents and is_float(self.facts.dtype.get(value)):
                self.add(value, seed_relevance(self.array(value)))
        for node in reversed(list(self.model.graph)):
            relevance = [self.pending.pop(value, None) for value in node.outputs]
            for value, array in zip(node.outputs, relevance, strict=True):
                if array is not None and value.name in self.targets:
                    reached[str(value.name)] = array
            if len(reached) == len(self.targets):
                break
            if all(array is None for array in relevance) or self.contents.keys().isdisjoint(used_values(node)):
                continue
            if has_subgraphs(node):
                raise no_relevance_rule(node, "control flow")
            self.propagate_node(node, relevance)
        return {name: reached.get(name, np.zeros(self.shape(name))) for name in self.targets}

    def shape(self, name: str) -> tuple[int, ...]:
        return next(array.shape for value, array in self.contents.items() if value.name == name)

    def array(self, value: ir.Value | None) -> FloatArray:
        """The contents of a value or constant, in float64."""
        assert value is not None
        contents = self.contents[value] if value in self.contents else value.const_value.numpy()  # type: ignore[union-attr]
        return np.asarray(contents, np.float64)

    def add(self, value: ir.Value | None, relevance: FloatArray) -> None:
        """Add relevance to a value; what goes to constants is dropped."""
        if value is None or value not in self.contents:
            return
        self.pending[value] = self.pending[value] + relevance if value in self.pending else relevance

    def propagate_node(self, node: ir.Node, relevance: Sequence[FloatArray | None]) -> None:
        """Distribute the relevance of a node's outputs over its inputs, by the rule of its operator kind."""
        spec = lookup(node.domain, node.op_type)
        call = self.facts.call(node, opset_version(self.model, node.domain))
        arrays = [np.zeros(call.out_shapes[k]) if array is None else array for k, array in enumerate(relevance)]
        RELEVANCE_RULES[spec.kind](self, node, spec, call, arrays)


def seed_relevance(output: FloatArray) -> FloatArray:
    """One at the largest entry of each sample."""
    flat = output.reshape(len(output), -1)
    seed = np.zeros(flat.shape)
    seed[np.arange(len(flat)), flat.argmax(1)] = 1
    return seed.reshape(output.shape)


def attention_weight_values(model: ir.Model) -> set[ir.Value]:
    """Attention weights: the outputs of softmax, also behind movement."""
    weights: set[ir.Value] = set()
    for node in model.graph:
        spec = lookup(node.domain, node.op_type)
        passes_on = spec.kind == "movement" or (spec.kind == "pointwise" and spec.effect == "same")
        if spec.makes_shares or (passes_on and node.inputs and node.inputs[0] in weights):
            weights.add(node.outputs[0])
    return weights


def no_relevance_rule(node: ir.Node, reason: str) -> UserError:
    return UserError(f"{node.op_type} {node.name}: relevance cannot be propagated through it ({reason}); use topk")


# -- rules -----------------------------------------------------------------------------------------------------------


def relevance_pointwise(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """To the operands that have the shape of the output; biases, gains and statistics count as constants."""
    operands = [
        value
        for k, value in enumerate(node.inputs)
        if value is not None
        and value in propagation.contents
        and call.shape(k) == call.out_shapes[0]
        and is_float(propagation.facts.dtype.get(value))
    ]
    if spec.divides:
        operands = operands[:1]
    if spec.effect == "add":
        share_by_magnitude(propagation, operands, relevance[0])
        return
    for value in operands:
        propagation.add(value, relevance[0] / len(operands))


def share_by_magnitude(propagation: RelevancePropagation, values: Sequence[ir.Value], total: FloatArray) -> None:
    """Distribute relevance over the terms of a sum, entry by entry in proportion to their magnitude."""
    if len(values) == 1:
        propagation.add(values[0], total)
        return
    magnitudes = [np.abs(propagation.array(value)) for value in values]
    sum_of_magnitudes = np.maximum(sum(magnitudes[1:], magnitudes[0]), RELEVANCE_EPSILON)
    for value, magnitude in zip(values, magnitudes, strict=True):
        propagation.add(value, total * magnitude / sum_of_magnitudes)


def relevance_normalize(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """To the data; for the sum that a fused node also gives, its relevance is added."""
    total = relevance[0] + sum((relevance[k] for k in spec.sum_outputs if k < len(relevance)), np.zeros(()))
    share_by_magnitude(propagation, [v for k in spec.data or (0,) if (v := node.inputs[k]) is not None], total)


def relevance_reduce(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """To the entries that are reduced, in proportion to their magnitude."""
    assert spec.axes is not None
    axes = spec.axes(call)
    total = relevance[0]
    if len(call.out_shapes[0]) != len(call.shape(0)):
        total = np.expand_dims(total, axes)
    magnitude = np.abs(propagation.array(node.inputs[0]))
    total_magnitude = np.maximum(magnitude.sum(axes, keepdims=True), RELEVANCE_EPSILON)
    propagation.add(node.inputs[0], total * magnitude / total_magnitude)


def relevance_movement(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """Back to the positions that the entries came from."""
    assert spec.move is not None
    shape = call.shape(0)
    size = int(np.prod(shape, dtype=np.int64))
    try:
        sources = spec.move(call, np.arange(size, dtype=np.int32).reshape(shape))
    except Blocked as block:
        raise no_relevance_rule(node, block.reason) from None
    total = np.zeros(size)
    for source, array in zip(sources, relevance, strict=False):
        position, flat = np.broadcast_to(source, array.shape).reshape(-1), array.reshape(-1)
        total += np.bincount(position[position >= 0], flat[position >= 0], size)
    propagation.add(node.inputs[0], total.reshape(shape))


def relevance_concat(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """Each input gets its part."""
    axis = int(call.attrs["axis"]) % len(call.out_shapes[0])
    ends = np.cumsum([call.shape(k)[axis] for k in range(len(call.shapes))])[:-1]
    for value, part in zip(node.inputs, np.split(relevance[0], ends, axis), strict=True):
        propagation.add(value, part)


def relevance_contraction(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """To the one operand that is an activation and no attention weight, by the z+ rule."""
    assert spec.letters is not None
    try:
        letters = spec.letters(call)
    except Blocked as block:
        raise no_relevance_rule(node, block.reason) from None
    if letters.windowed:
        raise no_relevance_rule(node, "it sees tokens through a window")
    values = [node.inputs[k] for k in spec.operands]
    is_activation = [v in propagation.contents and v not in propagation.attention_weights for v in values]
    if sum(is_activation) != 1:
        raise no_relevance_rule(node, "a product of two activations that is no attention")
    activation, weight = (0, 1) if is_activation[0] else (1, 0)
    arrays, terms = [propagation.array(value) for value in values], (letters.left, letters.right)
    equation = (terms[activation], terms[weight], letters.out)
    propagation.add(values[activation], z_plus(arrays[activation], arrays[weight], equation, relevance[0]))


def z_plus(x: FloatArray, w: FloatArray, equation: tuple[str, str, str], total: FloatArray) -> FloatArray:
    """Relevance of ``x``, in its shape. Each output, of relevance ``total``, is a sum of products x * w; its relevance
    is shared by the positive ones, or by magnitude among all where none is positive.

    ``equation``: the einsum terms of x, of w and of the output.
    """
    shape = x.shape
    (x, x_term), (w, w_term), (total, out_term) = map(squeeze_term, (x, w, total), equation)
    forward, backward = f"{x_term},{w_term}->{out_term}", f"{out_term},{w_term}->{x_term}"

    def product(a: FloatArray, b: FloatArray) -> FloatArray:
        return np.asarray(np.einsum(forward, a, b, optimize=True))

    def share_of(a: FloatArray, b: FloatArray, ratio: FloatArray) -> FloatArray:
        return np.asarray(a * np.einsum(backward, ratio, b, optimize=True))

    above, below = (np.maximum(x, 0), np.maximum(w, 0)), (np.minimum(x, 0), np.minimum(w, 0))
    positive = product(*above) + product(*below)
    no_positive = positive <= RELEVANCE_EPSILON
    ratio = np.where(no_positive, 0.0, total / np.maximum(positive, RELEVANCE_EPSILON))
    relevance = share_of(*above, ratio) + share_of(*below, ratio)
    if no_positive.any():
        magnitudes = np.abs(x), np.abs(w)
        ratio = np.where(no_positive, total / np.maximum(product(*magnitudes), RELEVANCE_EPSILON), 0.0)
        relevance = relevance + share_of(*magnitudes, ratio)
    return relevance.reshape(shape)


def squeeze_term(array: FloatArray, term: str) -> tuple[FloatArray, str]:
    """The array and its einsum term without axes of size 1, which other operands may have longer."""
    keep = "".join(letter for letter, size in zip(term, array.shape, strict=True) if size > 1)
    return np.squeeze(array), keep


def relevance_attention(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """To the values; the attention weights of the fused node are computed again."""
    form = attention_form(call, node.domain)
    extras = [k for k in (form.scores, *form.past, *form.rotary, *form.others(call)) if k is not None]
    if form.packed or any(call.has(k) for k in extras):
        raise no_relevance_rule(node, "it holds its projections, or takes a mask or a cache")
    if call.attrs.get("is_causal") or call.attrs.get("unidirectional"):
        raise no_relevance_rule(node, "it hides later tokens")
    if form.bias is not None and call.has(form.bias):
        raise no_relevance_rule(node, "it adds a bias inside")
    heads, _ = head_counts(call)
    query, key, value = (propagation.array(node.inputs[k]) for k in (form.query, form.key, form.value))

    def split(x: FloatArray) -> FloatArray:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) if heads else x

    q, k, v, total = (split(x) for x in (query, key, value, relevance[0]))
    if k.shape[1] != q.shape[1]:
        raise no_relevance_rule(node, "heads share keys")
    scale = float(call.attrs.get("scale") or 0) or q.shape[-1] ** -0.5
    scores = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_values = z_plus(v, weights, ("bhkd", "bhqk", "bhqd"), total)
    if heads:
        of_values = of_values.transpose(0, 2, 1, 3).reshape(value.shape)
    propagation.add(node.inputs[form.value], of_values)


def relevance_shape(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """Shapes carry no relevance."""


def relevance_opaque(
    propagation: RelevancePropagation, node: ir.Node, spec: OpSpec, call: OpCall, relevance: Sequence[FloatArray]
) -> None:
    """Unknown operators have no rule."""
    raise no_relevance_rule(node, spec.reason)


RELEVANCE_RULES: Mapping[str, Callable[[RelevancePropagation, ir.Node, OpSpec, OpCall, Sequence[FloatArray]], None]] = {
    "pointwise": relevance_pointwise,
    "normalize": relevance_normalize,
    "reduce": relevance_reduce,
    "movement": relevance_movement,
    "concat": relevance_concat,
    "contraction": relevance_contraction,
    "attention": relevance_attention,
    "shape": relevance_shape,
    "choose": relevance_opaque,
    "one_hot": relevance_shape,
    "experts": relevance_opaque,
    "opaque": relevance_opaque,
}
