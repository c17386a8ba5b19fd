"""Constants that are moved before a node on quantized values reads them: onnxruntime-genai's builder lays the weight of
the last layer out anew for the table of embeddings that shares it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, opset_version, run_reference, unused_name
from snpc.ops import is_quantized_operator, lookup
from snpc.passes.quantization.float_values import stored


def fold_moved_constants(model: ir.Model) -> None:
    """Make constants of what nodes move that nodes on quantized values read, where all that they read is stored."""
    graph = model.graph
    for node in list(graph):
        if not moves_constant(node):
            continue
        known = {v: tensor.numpy() for v in node.inputs if v is not None and (tensor := stored(v)) is not None}
        (moved,) = run_reference(node, known, opset_version(model))
        name = unused_name(f"{node.outputs[0].name}_moved", graph.initializers)
        node.outputs[0].replace_all_uses_with(add_constant(graph, np.asarray(moved), name))
        graph.remove(node, safe=True)


def moves_constant(node: ir.Node) -> bool:
    """Whether a node moves a constant of bytes or floats for a node on quantized values."""
    if node.domain or lookup("", node.op_type).kind != "movement" or len(node.outputs) != 1:
        return False
    tensors = [stored(v) for v in node.inputs if v is not None]
    if not tensors or any(tensor is None or tensor.dtype.bitwidth < 8 for tensor in tensors):
        return False
    out = node.outputs[0]
    readers = [is_quantized_operator(reader.domain, reader.op_type) for reader in out.consumers()]
    return any(readers) and not out.is_graph_output()
