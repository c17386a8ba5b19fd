"""Static widths of KV caches: exporters declare the width of a cache as dynamic, though the node that reads it takes
one.

onnxruntime-genai's builder names it ``kv_cache_dim``, whatever the layer. A fused attention node knows it: its packed
columns divided by the heads, or the width of its keys and values. So it is written into the declared shapes of the past
inputs and the present outputs, where labels and random inputs find it.
"""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import base_dim_sizes, infer_graph, opset_version
from snpc.ops import ATTENTION_FORMS, attention_geometry


class DeclareCacheWidths(ir.passes.InPlacePass):
    """Declare the last axis of past inputs and present outputs of fused attention as static, where it is dynamic."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if any(has_dynamic_width(cache) for cache, _ in caches_of(node))]
        if not nodes:
            return ir.passes.PassResult(model, False)
        facts = infer_graph(model, base_dim_sizes(model.graph)[0], measure=False)
        modified = False
        for node in nodes:
            sizes = attention_geometry(facts.call(node, opset_version(model, node.domain)), node.domain)
            for cache, part in caches_of(node) if sizes is not None else ():
                if has_dynamic_width(cache):
                    assert sizes is not None and cache.shape is not None
                    cache.shape = ir.Shape([*cache.shape[:-1], (sizes.width, sizes.value_width)[part]])
                    modified = True
        return ir.passes.PassResult(model, modified)


def caches_of(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """Past inputs and present outputs of the graph that a fused node reads and writes: 0 for keys, 1 for values, 0
    where both lie in one tensor."""
    form = ATTENTION_FORMS.get((node.domain, node.op_type))
    if form is None:
        return []
    past = [(node.inputs[k], part) for part, k in enumerate(form.past) if k < len(node.inputs)]
    present = [(node.outputs[k], part) for part, k in enumerate(form.present) if k < len(node.outputs)]
    return [
        *((v, part) for v, part in past if v is not None and v.is_graph_input()),
        *((v, part) for v, part in present if v.is_graph_output()),
    ]


def has_dynamic_width(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 3 and not isinstance(value.shape[-1], int)
