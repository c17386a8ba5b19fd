"""Entries: a weight in front of a residual stream where something other than weights writes it.

A normalization of the embeddings, or an activation behind a convolution, makes values that no change of weights turns.
Behind it goes a weight [D, D], at first the identity. That writes the stream and can be turned, and what lies in front
keeps its channels. It is worth its MACs where a stream has one entry, and not where each block has two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, redirect_uses
from snpc.ops import lookup
from snpc.ops import names as op
from snpc.passes.grouping import TracedGraph


def entry_weight(value: str) -> str:
    """The name of the weight behind this value."""
    return f"{value}__entry"


def entered_graph(source: TracedGraph, names: Sequence[str]) -> ir.Model:
    """A copy of the graph with a weight, the identity, behind each of these values, which have the channels on their
    last axis. Weights that read the value go on to do so."""
    shapes = source.facts.shapes_by_name
    model = source.model.clone()
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in names:
        dtype = source.facts.types_by_name[name]
        identity = add_constant(model.graph, np.eye(shapes[name][-1]).astype(dtype.numpy()), entry_weight(name))
        product = make_node(op.MATMUL, [values[name], identity], name=entry_weight(name))
        users = [use for use in values[name].uses() if lookup(use.node.domain, use.node.op_type).kind != "contraction"]
        producer = values[name].producer()
        assert producer is not None
        model.graph.insert_after(producer, product)
        redirect_uses(users, product.outputs[0])
    return model
