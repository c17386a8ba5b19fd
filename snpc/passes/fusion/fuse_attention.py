"""Fuses attention in separate nodes into one node of onnxruntime's that computes the same.

No exporter's pattern is matched. An attention is the neighborhood of a softmax: a product of two activations before it,
one after it, and scaling, a bias and movement in between. That query, key and value are columns of
``[batch, length, heads * width]`` values upstream is derived from how positions move (see ``head_columns``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import (
    Attribute,
    ShapeFacts,
    add_constant,
    attribute_values,
    choose_dim_sizes,
    make_node,
    opset_version,
    scalar_factor_of,
)
from snpc.ops import (
    ATTENTION,
    CONCAT,
    EXPAND,
    GATHER,
    MICROSOFT,
    MULTI_HEAD_ATTENTION,
    RESHAPE,
    SHAPE,
    SLICE,
    SOFTMAX,
    SPLIT,
    TRANSPOSE,
    lookup,
)
from snpc.passes.fusion.head_columns import (
    HeadColumns,
    NotFusable,
    find_head_columns,
    find_merged_heads,
    require_single_consumer,
)
from snpc.passes.fusion.qkv_projection import pack_projections
from snpc.types import AnyArray, Shape


@dataclass(frozen=True)
class AttentionMatch:
    """One attention in separate nodes. ``out``: the value that the fused node computes instead."""

    query: HeadColumns
    key: HeadColumns
    value: HeadColumns
    scale: float
    bias: ir.Value | None
    out: ir.Value


@dataclass
class FusionBuilder:
    """The graph that is changed. Splits and biases that several fused nodes share are added once."""

    model: ir.Model
    facts: ShapeFacts
    splits: dict[tuple[ir.Value, tuple[int, ...]], tuple[ir.Value, ...]] = field(default_factory=dict)
    biases: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    count: int = 0

    def name(self, hint: str) -> str:
        self.count += 1
        return f"{hint}__fused{self.count}"

    def constant(self, numbers: list[int], hint: str) -> ir.Value:
        return self.tensor(np.asarray(numbers, np.int64), hint)

    def tensor(self, array: AnyArray, hint: str) -> ir.Value:
        return add_constant(self.model.graph, array, self.name(hint), typed=False)

    def node(
        self,
        op: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Attribute],
        hint: str,
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        name = self.name(hint)
        names = [f"{name}_out{k}" for k in range(outputs)]
        node = make_node(op, inputs, attributes, name=name, outputs=names, domain=domain)
        self.model.graph.append(node)
        return tuple(node.outputs)


@dataclass
class FusionResult(ir.passes.PassResult):
    """``count``: how many subgraphs were replaced by a fused node."""

    count: int


class FuseAttention(ir.passes.FunctionalPass):
    """Replace every attention of a canonical model that allows it by one com.microsoft.MultiHeadAttention.

    Q and V may differ in width; scale and additive bias are carried over as they are. ``projections``: by one
    com.microsoft.Attention that holds the products of query, key and value as well; only such are counted.
    """

    def __init__(self, *, projections: bool = False) -> None:
        self.projections = projections

    def call(self, model: ir.Model) -> FusionResult:
        copy = model.clone()
        _, facts = choose_dim_sizes(copy)
        builder = FusionBuilder(copy, facts)
        count = 0
        for node in [n for n in copy.graph if n.op_type == SOFTMAX and not n.domain]:
            try:
                match = match_attention(node, facts, opset_version(copy))
            except NotFusable:
                continue
            projected = rewrite_attention(match, builder, self.projections)
            count += projected or not self.projections
        if count:
            copy.graph.opset_imports.setdefault(MICROSOFT, 1)
            common.RemoveUnusedNodesPass()(copy)
            copy.graph.sort()
        return FusionResult(copy, count > 0, count)


def attention_names(model: ir.Model) -> tuple[str, ...]:
    """Names of the nodes that stand for attentions: the softmax between two products, or the one node."""
    _, facts = choose_dim_sizes(model)
    version = opset_version(model)

    def is_attention(node: ir.Node) -> bool:
        if (node.domain, node.op_type) != ("", SOFTMAX):
            return lookup(node.domain, node.op_type).kind == "attention"
        try:
            scores, _, _ = match_scores(node, facts)
            batched_operands(scores, facts, version)
            match_context(node, facts)
        except NotFusable:
            return False
        return True

    return tuple(str(node.name) for node in model.graph if is_attention(node))


# -- matching --------------------------------------------------------------------------------------------------------


def match_attention(softmax: ir.Node, facts: ShapeFacts, version: int) -> AttentionMatch:
    """The attention around ``softmax``. Raises NotFusable."""
    scores_shape = facts.shape.get(softmax.outputs[0])
    axes = lookup("", SOFTMAX).axes
    if scores_shape is None or len(scores_shape) != 4 or axes is None or axes(facts.call(softmax, version)) != (3,):
        raise NotFusable("the softmax is not over the last of four axes")
    scores, scale, bias = match_scores(softmax, facts)
    context = match_context(softmax, facts)
    query, key, transposed = batched_operands(scores, facts, version)
    _, value, flipped = batched_operands(context, facts, version)
    sides = ((query, False), (key, not transposed), (value, flipped))
    q, k, v = (find_head_columns(value, swapped, facts, version) for value, swapped in sides)
    if q.width != k.width or len({q.heads, k.heads, v.heads}) != 1:
        raise NotFusable("heads or widths of query, key and value differ")
    if bias is not None:
        check_score_bias(bias, scores_shape, facts)
    out = find_merged_heads(context.outputs[0], facts, version)
    if v.factor != 1.0:
        raise NotFusable("the value is scaled")
    return AttentionMatch(q, k, v, scale * q.factor * k.factor, bias, out)


def match_scores(softmax: ir.Node, facts: ShapeFacts) -> tuple[ir.Node, float, ir.Value | None]:
    """(the product that makes the scores, the factor on them, the bias that is added after that)."""
    value, scale, bias = softmax.inputs[0], 1.0, None
    while value is not None and (node := value.producer()) is not None:
        require_single_consumer(value)
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "contraction":
            return node, scale * float(attribute_values(node).get("alpha", 1.0)), bias
        scalar, _ = scalar_factor_of(node, facts)
        if scalar is not None:
            scale *= scalar.factor
            value = node.inputs[1 - scalar.index]
        elif is_pass_through(node, facts):
            value = node.inputs[0]
        elif spec.kind == "pointwise" and spec.effect == "add" and not spec.subtracts and len(node.inputs) == 2:
            if bias is not None or scale != 1.0:
                raise NotFusable("two biases are added to the scores, or they are scaled after one")
            value, bias = split_scores_and_bias(node, facts)
        else:
            raise NotFusable(f"{node.op_type} stands between scores and softmax")
    raise NotFusable("no product makes the scores")


def split_scores_and_bias(node: ir.Node, facts: ShapeFacts) -> tuple[ir.Value, ir.Value]:
    """(scores, bias) of a sum: the scores are a product, scaled at most."""
    left, right = node.inputs
    assert left is not None and right is not None
    hits = [v for v in (left, right) if is_scaled_product(v, facts)]
    if len(hits) != 1:
        raise NotFusable("it cannot be told which summand is the scores")
    return hits[0], right if hits[0] is left else left


def is_scaled_product(value: ir.Value, facts: ShapeFacts) -> bool:
    node = value.producer()
    while node is not None:
        spec = lookup(node.domain, node.op_type)
        if spec.kind == "contraction":
            return all(v is None or v.const_value is None for v in node.inputs[:2])
        scalar, _ = scalar_factor_of(node, facts)
        if scalar is None and not is_pass_through(node, facts):
            return False
        value_in = node.inputs[1 - scalar.index] if scalar is not None else node.inputs[0]
        node = value_in.producer() if value_in is not None else None
    return False


def match_context(softmax: ir.Node, facts: ShapeFacts) -> ir.Node:
    """The product of attention weights and values."""
    weights = softmax.outputs[0]
    node = require_single_consumer(weights)
    while is_pass_through(node, facts):
        weights = node.outputs[0]
        node = require_single_consumer(weights)
    if lookup(node.domain, node.op_type).kind != "contraction" or attribute_values(node).get("alpha", 1.0) != 1.0:
        raise NotFusable(f"{node.op_type} reads the attention weights")
    if node.inputs[0] is not weights:
        raise NotFusable("the attention weights are not the left operand")
    return node


def is_pass_through(node: ir.Node, facts: ShapeFacts) -> bool:
    """Is it a node that returns its input: a cast to the same type, a dropout?"""
    spec = lookup(node.domain, node.op_type)
    source = node.inputs[0] if node.inputs else None
    same = source is not None and facts.dtype.get(source) == facts.dtype.get(node.outputs[0])
    return spec.kind == "pointwise" and spec.effect == "same" and same


def batched_operands(node: ir.Node, facts: ShapeFacts, version: int) -> tuple[ir.Value, ir.Value, bool]:
    """(left [B,H,M,K], right, whether right is [B,H,N,K] and not [B,H,K,N]) of a product over two batch axes."""
    letters_of = lookup(node.domain, node.op_type).letters
    left, right = node.inputs[:2]
    if letters_of is None or left is None or right is None:
        raise NotFusable("a product of other than two tensors")
    if any(len(facts.shape.get(v) or ()) != 4 for v in (left, right)):
        raise NotFusable("a product without two batch axes")
    letters = letters_of(facts.call(node, version))
    batch, summed = letters.left[:2], letters.left[3]
    if (letters.right[:2], letters.out[:2]) != (batch, batch) or summed not in letters.right[2:]:
        raise NotFusable("a product that sums over another axis")
    if letters.out[2:] != letters.left[2] + letters.right[2:].replace(summed, ""):
        raise NotFusable("a product with another order of axes")
    return left, right, letters.right[3] == summed


def check_score_bias(bias: ir.Value, scores: Shape, facts: ShapeFacts) -> None:
    shape = facts.shape.get(bias)
    if shape is None or len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, scores, strict=True)):
        raise NotFusable("the bias does not have four axes that broadcast")
    if shape[3] != scores[3]:
        raise NotFusable("the bias is constant along the keys")


# -- writing ---------------------------------------------------------------------------------------------------------


def rewrite_attention(match: AttentionMatch, builder: FusionBuilder, projections: bool) -> bool:
    """Replace the attention by a fused node. Returns whether that node holds the projections as well."""
    if projections:
        with suppress(NotFusable):
            rewrite_projected_attention(match, builder)
            return True
    query, key, value = separate_query_key_value(match, builder)
    attributes: dict[str, Attribute] = {"num_heads": match.query.heads, "scale": match.scale}
    inputs: list[ir.Value | None] = [query, key, value]
    if match.bias is not None:
        inputs += [None, None, expand_bias(match, query, builder)]
    (output,) = builder.node(MULTI_HEAD_ATTENTION, inputs, attributes, "attention", domain=MICROSOFT)
    match.out.replace_all_uses_with(output)
    return False


def rewrite_projected_attention(match: AttentionMatch, builder: FusionBuilder) -> None:
    """One com.microsoft.Attention. Raises NotFusable before anything is changed."""
    columns = (match.query, match.key, match.value)
    packed = pack_projections(columns, builder.facts)
    attributes: dict[str, Attribute] = {
        "num_heads": match.query.heads,
        "scale": match.scale,
        "qkv_hidden_sizes": [p.columns for p in columns],
    }
    inputs: list[ir.Value | None] = [packed.source, *(builder.tensor(a, "qkv") for a in (packed.weight, packed.bias))]
    if match.bias is not None:
        inputs += [None, None, expand_bias(match, packed.source, builder)]
    (output,) = builder.node(ATTENTION, inputs, attributes, "attention", domain=MICROSOFT)
    match.out.replace_all_uses_with(output)


def separate_query_key_value(match: AttentionMatch, builder: FusionBuilder) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value as separate values: by one Split where they fill one value."""
    columns = (match.query, match.key, match.value)
    shape = builder.facts.shape[match.query.value]
    ends = [p.start + p.columns for p in columns]
    together = len({p.value for p in columns}) == 1 and [p.start for p in columns] == [0, *ends[:2]]
    if together and not match.query.order and shape is not None and ends[2] == shape[2]:
        q, k, v = split_columns(match.query.value, tuple(p.columns for p in columns), builder)
        return q, k, v
    q, k, v = (take_columns(p, builder) for p in columns)
    return q, k, v


def split_columns(value: ir.Value, sizes: tuple[int, ...], builder: FusionBuilder) -> tuple[ir.Value, ...]:
    if (value, sizes) not in builder.splits:
        inputs: list[ir.Value | None] = [value]
        attributes: dict[str, Attribute] = {"axis": 2}
        if opset_version(builder.model) >= 13:
            inputs.append(builder.constant(list(sizes), "sizes"))
        else:
            attributes["split"] = sizes
        builder.splits[value, sizes] = builder.node(SPLIT, inputs, attributes, "qkv", outputs=len(sizes))
    return builder.splits[value, sizes]


def take_columns(heads: HeadColumns, builder: FusionBuilder) -> ir.Value:
    shape = builder.facts.shape[heads.value]
    assert shape is not None
    if heads.order:
        (ordered,) = builder.node(TRANSPOSE, [heads.value], {"perm": heads.order}, "heads")
        return builder.node(RESHAPE, [ordered, builder.constant([0, 0, heads.columns], "flat")], {}, "columns")[0]
    if heads.columns == shape[2]:
        return heads.value
    bounds = [builder.constant([n], "bound") for n in (heads.start, heads.start + heads.columns, 2)]
    return builder.node(SLICE, [heads.value, *bounds], {}, "columns")[0]


def expand_bias(match: AttentionMatch, query: ir.Value, builder: FusionBuilder) -> ir.Value:
    """MultiHeadAttention broadcasts a bias over batch and heads only: a row that serves all queries is expanded."""
    bias = match.bias
    assert bias is not None
    shape, length = builder.facts.shape[bias], builder.facts.shape[match.out]
    assert shape is not None and length is not None
    if shape[2] == length[1]:
        return bias
    key = (bias, length[1])
    if key not in builder.biases:
        (sizes,) = builder.node(SHAPE, [query], {}, "sizes")
        (rows,) = builder.node(GATHER, [sizes, builder.constant([1], "axis")], {}, "length")
        one, two = builder.constant([1], "one"), builder.constant([1, 1], "two")
        (target,) = builder.node(CONCAT, [two, rows, one], {"axis": 0}, "target")
        builder.biases[key] = builder.node(EXPAND, [bias, target], {}, "bias")[0]
    return builder.biases[key]
