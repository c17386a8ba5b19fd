"""What was fitted to one model, as edits of a companion: constants of new contents, and biases that were added."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from snpc.ops import ADD
from snpc.passes.companions.alignment import GraphAlignment, content_of
from snpc.passes.weights import UnsupportedWeightForm, WeightEdits
from snpc.types import AnyArray, FloatArray


def transferred_edits(original: ir.Model, fitted: ir.Model, alignment: GraphAlignment) -> WeightEdits:
    """The edits that make of a companion what ``fitted`` is of ``original``, both of full size.

    Raises UnsupportedWeightForm where a change has no place in the companion.
    """
    edits = WeightEdits()
    constants = dict(original.graph.initializers)
    changed = {
        name: value.const_value
        for name, value in fitted.graph.initializers.items()
        if name in constants and value.const_value is not constants[name].const_value
    }
    placed = set()
    for name, original_name in alignment.constants.items():
        tensor = changed.get(original_name)
        if tensor is not None:
            edits.changes[name] = [replacement(tensor.numpy())]
            placed.add(original_name)
    for name in changed.keys() - placed:
        if content_of(constants[name]) in alignment.contents:
            raise UnsupportedWeightForm(f"{name} was fitted, and several constants have its contents")
    known = {str(node.name) for node in original.graph}
    for node in fitted.graph:
        if str(node.name) not in known:
            place, vector = added_bias(node)
            if place in alignment.nodes:
                edits.add_bias(alignment.nodes[place], vector)
            elif weights_are_shared(original, place, alignment):
                raise UnsupportedWeightForm(f"a bias was added to {place}, which is not found there")
    return edits


def replacement(array: AnyArray) -> Callable[[FloatArray], FloatArray]:
    return lambda _: array.astype(np.float64)


def added_bias(node: ir.Node) -> tuple[str, FloatArray]:
    """The node to whose output an added node adds a vector, and that vector. Raises UnsupportedWeightForm for any other
    node."""
    product, bias = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    producer = product.producer() if product is not None else None
    if node.op_type != ADD or producer is None or bias is None or bias.const_value is None:
        raise UnsupportedWeightForm(f"fitting added the {node.op_type} {node.name}")
    return str(producer.name), bias.const_value.numpy().astype(np.float64)


def weights_are_shared(original: ir.Model, node_name: str, alignment: GraphAlignment) -> bool:
    """Has the companion a weight that this node reads?"""
    node = next(n for n in original.graph if n.name == node_name)
    return any(v is not None and content_of(v) in alignment.contents for v in node.inputs)
