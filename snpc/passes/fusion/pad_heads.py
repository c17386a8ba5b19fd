"""Makes the heads of queries, keys and values equally wide, by zeros.

TensorRT has one kernel for an attention whose queries, keys and values are equally wide, and refuses an ONNX Attention
node whose values are not as wide as its keys. Channels that are zero add nothing to the scores; those of the values
come out of the second product as zeros, and are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    add_constant,
    attribute_values,
    choose_dim_sizes,
    make_node,
    opset_version,
    redirect_uses,
    unused_name,
)
from snpc.ops import PAD, RESHAPE, SLICE, SOFTMAX, attention_form, attention_geometry, lookup
from snpc.passes.fusion.fuse_attention import FusionResult, batched_operands, match_context, match_scores
from snpc.passes.fusion.head_columns import NotFusable

LEAST_WIDTH = 16  # of a head that TensorRT's kernel takes: it pads 9 to 15 itself, and does not take 8
PAD_OPSET = 11  # the first opset in which Pad takes its widths as an input


@dataclass
class HeadPadding:
    """The graph that is changed."""

    model: ir.Model
    facts: ShapeFacts
    constants: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.taken = {*graph.initializers, *(str(n.name) for n in graph)}

    def name(self, hint: str) -> str:
        name = unused_name(hint, self.taken)
        self.taken.add(name)
        return name

    def constant(self, *numbers: int) -> ir.Value:
        if numbers not in self.constants:
            array = np.asarray(numbers, np.int64)
            self.constants[numbers] = add_constant(self.model.graph, array, self.name("pad_heads"), typed=False)
        return self.constants[numbers]

    def node(self, op: str, inputs: list[ir.Value | None], hint: str) -> ir.Value:
        node = make_node(op, inputs, name=self.name(hint))
        self.model.graph.append(node)
        return node.outputs[0]

    def pad(self, value: ir.Value, axis: int, extra: int, hint: str) -> ir.Value:
        """``value`` [B,H,.,.] with ``extra`` zeros at the end of ``axis``."""
        widths = [0] * 8
        widths[4 + axis] = extra
        return self.node(PAD, [value, self.constant(*widths)], hint)

    def cut(self, value: ir.Value, width: int, hint: str) -> ir.Value:
        """The first ``width`` positions of the last of four axes."""
        return self.node(SLICE, [value, self.constant(0), self.constant(width), self.constant(3)], hint)

    def reshape(self, value: ir.Value, hint: str, *sizes: int) -> ir.Value:
        """``value`` [B,N,.] or [B,N,.,.] with the axes ``sizes`` in place of those behind the second."""
        return self.node(RESHAPE, [value, self.constant(0, 0, *sizes)], hint)

    def widen_input(self, node: ir.Node, index: int, axis: int, extra: int) -> None:
        value = node.inputs[index]
        assert value is not None
        if extra:
            node.replace_input_with(index, self.pad(value, axis, extra, f"{node.name}_pad{index}"))


class PadAttentionHeads(ir.passes.FunctionalPass):
    """Pad heads of queries, keys and values to the widest of them, and to ``LEAST_WIDTH``; ``count``: attentions."""

    def call(self, model: ir.Model) -> FusionResult:
        copy = model.clone()
        if opset_version(copy) < PAD_OPSET:
            return FusionResult(copy, False, 0)
        _, facts = choose_dim_sizes(copy)
        padding = HeadPadding(copy, facts)
        count = 0
        for node in list(copy.graph):
            if (node.domain, node.op_type) == ("", SOFTMAX):
                count += pad_separate_nodes(node, padding)
            elif not node.domain and lookup("", node.op_type).kind == "attention":
                count += pad_attention_node(node, padding)
        copy.graph.sort()
        return FusionResult(copy, count > 0, count)


def padded_width(query: int, value: int) -> int | None:
    """The width that heads get; None where they are equally wide and wide enough."""
    return None if query == value >= LEAST_WIDTH else max(query, value, LEAST_WIDTH)


def pad_separate_nodes(softmax: ir.Node, padding: HeadPadding) -> bool:
    """Pad the operands of the two products around ``softmax``. Whether there was something to pad."""
    facts, version = padding.facts, opset_version(padding.model)
    try:
        scores, _, _ = match_scores(softmax, facts)
        context = match_context(softmax, facts)
        query, _, transposed = batched_operands(scores, facts, version)
        _, value, flipped = batched_operands(context, facts, version)
    except NotFusable:
        return False
    if context.outputs[0].is_graph_output():
        return False
    query_shape, value_shape = facts.shape[query], facts.shape[value]
    assert query_shape is not None and value_shape is not None
    value_axis = 2 if flipped else 3
    width, value_width = query_shape[3], value_shape[value_axis]
    to = padded_width(width, value_width)
    if to is None:
        return False
    padding.widen_input(scores, 0, 3, to - width)
    padding.widen_input(scores, 1, 3 if transposed else 2, to - width)
    padding.widen_input(context, 1, value_axis, to - value_width)
    if to > value_width:
        replace_output(context, lambda out: padding.cut(out, value_width, f"{context.name}_cut"))
    return True


def pad_attention_node(node: ir.Node, padding: HeadPadding) -> bool:
    """Pad the operands of an ONNX Attention node without caches. Whether there was something to pad."""
    call = padding.facts.call(node, opset_version(padding.model))
    form, sizes = attention_form(call, ""), attention_geometry(call, "")
    used = [value for value in node.outputs[1:] if value.uses()]
    outputs = any(value.is_graph_output() for value in node.outputs)
    if sizes is None or used or outputs or any(call.has(k) for k in form.past):
        return False
    to = padded_width(sizes.width, sizes.value_width)
    if to is None:
        return False
    heads, narrow = sizes.heads, sizes.value_width
    if not attribute_values(node).get("scale"):  # the default is that of the width
        node.attributes["scale"] = ir.convenience.convert_attribute("scale", 1.0 / math.sqrt(sizes.width))
    flat = len(call.shape(form.query)) == 3
    widths = (
        (form.query, heads, sizes.width),
        (form.key, sizes.kv_heads, sizes.width),
        (form.value, sizes.kv_heads, narrow),
    )
    for index, count, width in widths:
        value = node.inputs[index]
        assert value is not None
        if flat and to > width:
            value = padding.reshape(value, f"{node.name}_split{index}", count, width)
            value = padding.pad(value, 3, to - width, f"{node.name}_pad{index}")
            node.replace_input_with(index, padding.reshape(value, f"{node.name}_flat{index}", count * to))
        else:
            padding.widen_input(node, index, 3, to - width)

    def cut(out: ir.Value) -> ir.Value:
        wide = padding.reshape(out, f"{node.name}_split", heads, to) if flat else out
        cut = padding.cut(wide, narrow, f"{node.name}_cut")
        return padding.reshape(cut, f"{node.name}_flat", heads * narrow) if flat else cut

    if to > narrow:
        replace_output(node, cut)
    return True


def replace_output(node: ir.Node, make: Callable[[ir.Value], ir.Value]) -> None:
    """All that read the output of ``node`` read what ``make`` makes of it."""
    wide = node.outputs[0]
    users = list(wide.uses())
    wide.shape = None  # that of before
    redirect_uses(users, make(wide))
