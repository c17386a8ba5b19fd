"""Expands norms on the heads of queries and keys inside a fused attention node: each becomes nodes in front of it.

onnxruntime-genai's builder writes them into GroupQueryAttention for CUDA and WebGPU. As nodes of their own they are cut
like any norm on heads, and run on every provider.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, attribute_values, make_node, static_shape, unused_name
from snpc.ops import ATTENTION_FORMS, RESHAPE, SIMPLIFIED_LAYER_NORMALIZATION, SPLIT, AttentionForm

EPSILON = "qk_norm_epsilon"
DEFAULT_EPSILON = 1e-6


class ExpandHeadNorms(ir.passes.InPlacePass):
    """Leave no norm of queries and keys inside a fused node, where its gain is stored."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            form = ATTENTION_FORMS.get((node.domain, node.op_type))
            width = width_of_gains(node, form) if form is not None else None
            if form is None or width is None:
                continue
            model.graph.insert_before(node, list(expansion(model.graph, node, form, width)))
            node.attributes.pop(EPSILON, None)
            modified = True
        return ir.passes.PassResult(model, modified)


def width_of_gains(node: ir.Node, form: AttentionForm) -> int | None:
    """The width of a head, from the gains that a node holds; None where it holds none, or they are not stored."""
    gains = [node.inputs[k] for k in form.norms if k < len(node.inputs)]
    stored = [gain.const_value for gain in gains if gain is not None and gain.const_value is not None]
    shapes = {static_shape(tensor) for tensor in stored}
    if len(stored) < 2 or len(shapes) != 1 or "num_heads" not in node.attributes:
        return None
    shape = shapes.pop()
    return shape[0] if len(shape) == 1 else None


def expansion(graph: ir.Graph, node: ir.Node, form: AttentionForm, width: int) -> Iterator[ir.Node]:
    """The nodes in front of ``node``, which reads them from now on: one that splits packed columns, and three per
    norm, over the last axis of [batch, tokens * heads, ``width``]."""
    prefix = unused_name(f"{node.name or node.outputs[0].name}__norm", graph.initializers)
    attributes = attribute_values(node)
    heads = int(attributes["num_heads"])
    key_heads = int(attributes.get("kv_num_heads", heads))
    columns = [heads * width, key_heads * width, key_heads * width]
    if node.inputs[form.key] is None:
        sizes = add_constant(graph, np.array(columns, np.int64), f"{prefix}_columns")
        parts = [f"{prefix}_{part}" for part in ("query", "key", "value")]
        split = make_node(SPLIT, [node.inputs[form.query], sizes], {"axis": -1}, name=f"{prefix}_split", outputs=parts)
        yield split
        for index, value in zip((form.query, form.key, form.value), split.outputs, strict=True):
            node.replace_input_with(index, value)
    for index, size, gain_index in zip((form.query, form.key), columns, form.norms, strict=False):
        name, gain = f"{prefix}_{index}", node.inputs[gain_index]
        by_head = add_constant(graph, np.array([0, -1, width], np.int64), f"{name}_heads")
        merged = add_constant(graph, np.array([0, -1, size], np.int64), f"{name}_columns")
        split_heads = make_node(RESHAPE, [node.inputs[index], by_head], name=f"{name}_split_heads")
        epsilon = float(attributes.get(EPSILON, DEFAULT_EPSILON))
        norm = make_node(
            SIMPLIFIED_LAYER_NORMALIZATION,
            [split_heads.outputs[0], gain],
            {"axis": -1, "epsilon": epsilon, "stash_type": 1},
            name=name,
        )
        merge_heads = make_node(RESHAPE, [norm.outputs[0], merged], name=f"{name}_merge_heads")
        yield from (split_heads, norm, merge_heads)
        node.replace_input_with(index, merge_heads.outputs[0])
        node.replace_input_with(gain_index, None)
