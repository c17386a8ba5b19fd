"""graph -> graph: sizes that are the same for every input are written down, instead of computed at every run.

Exporters compute the target of a reshape from the shape of its input, in ten small nodes each. What onnx's own shape
inference proves to be fixed becomes a constant; a target of which one entry is left open gets -1 there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common

from snpc.ops import lookup
from snpc.ops.writing import RESHAPE, SHAPE
from snpc.passes.shapes import attributes, opset
from snpc.types import IntArray

ROUNDS = 4  # a size that is written down lets more be inferred behind it
LARGEST = 64  # entries of a value that still counts as sizes
OPEN = -(2**40)  # an entry that depends on the input, told apart from any size or -1
STANDARD = ("", "ai.onnx")

Known = dict[ir.Value, IntArray]


def settle_sizes(model: ir.Model) -> ir.Model:
    """``model`` itself, without the arithmetic on shapes whose outcome no input changes; outputs stay as they were."""
    for _ in range(ROUNDS):
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        known = known_sizes(model)
        if not sum([settle(node, known, model.graph) for node in list(model.graph)]):
            break
    common.RemoveUnusedNodesPass()(model)
    return model


def known_sizes(model: ir.Model) -> Known:
    """Contents of small integer tensors; entries that depend on the input are OPEN."""
    known: Known = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input() or tensor is None:
            continue
        if tensor.dtype == ir.DataType.INT64 and tensor.size <= LARGEST:
            known[value] = tensor.numpy()
    for node in model.graph:
        if node.domain in STANDARD and len(node.outputs) == 1:
            found = sizes_made(node, known, opset(model))
            if found is not None and found.dtype == np.int64 and found.size <= LARGEST:
                known[node.outputs[0]] = found
    return known


def sizes_made(node: ir.Node, known: Known, version: int) -> IntArray | None:
    if node.op_type == SHAPE:
        return sizes_of(node)
    inputs = [v for v in node.inputs if v is not None]
    if not inputs or not all(v in known for v in inputs):
        return None
    kind = lookup("", node.op_type).kind
    moved = inputs if kind == "concat" else inputs[:1] if kind == "movement" else []  # of these any entry may be OPEN
    if any((known[v] == OPEN).any() for v in inputs if v not in moved):
        return None
    feeds = {str(v.name): known[v] for v in inputs}
    try:
        (made,) = ReferenceEvaluator(ir.serde.serialize_node(node), opsets={"": version}).run(None, feeds)
    except Exception:  # what the reference cannot compute stays in the graph
        return None
    return np.asarray(made)


def sizes_of(node: ir.Node) -> IntArray | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    attrs = attributes(node)
    sizes = np.asarray([dim if isinstance(dim, int) else OPEN for dim in shape], np.int64)
    return sizes[attrs.get("start", 0) : attrs.get("end", len(sizes))]


def settle(node: ir.Node, known: Known, graph: ir.Graph) -> int:
    """Inputs of ``node`` that are computed and known become constants. Returned: how many."""
    if all(out in known and not (known[out] == OPEN).any() for out in node.outputs):
        return 0  # nobody needs it any more
    count = 0
    for index, value in enumerate(node.inputs):
        if value is None or value not in known or value.producer() is None:
            continue
        sizes = known[value]
        if index == 1 and node.op_type == RESHAPE and node.domain in STANDARD:
            sizes = target(sizes)
        if not (sizes == OPEN).any():
            node.replace_input_with(index, constant(graph, f"{value.name}__settled", sizes))
            count += 1
    return count


def target(sizes: IntArray) -> IntArray:
    """The target of a reshape: one entry that is open is what is left."""
    alone = (sizes == OPEN).sum() == 1 and (sizes[sizes != OPEN] > 0).all()
    return np.where(sizes == OPEN, -1, sizes) if alone else sizes


def constant(graph: ir.Graph, name: str, array: IntArray) -> ir.Value:
    if name in graph.initializers and np.array_equal(graph.initializers[name].const_value.numpy(), array):  # type: ignore[union-attr]
        return graph.initializers[name]
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        const_value=ir.Tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.INT64),
    )
    graph.register_initializer(value)
    return value
