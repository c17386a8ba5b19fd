"""Shapes of a graph's values, read from one run on random inputs, for values that shape inference knows nothing of."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import MeasuredValue, add_constant, make_node, malformed_graph_errors, unused_name
from snpc.ops import GATHER, RESHAPE, SHAPE
from snpc.runtime.execution.feeds import random_feeds
from snpc.runtime.execution.machine import free_memory
from snpc.runtime.execution.memory import model_weights, session_bytes
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.types import AnyArray, Shape, TensorSpec


def run_for_shapes(
    model: ir.Model, values: Sequence[ir.Value], untyped: Container[ir.Value], inputs: Mapping[str, Shape]
) -> Mapping[ir.Value, MeasuredValue]:
    """See ``snpc.graph.ShapeSource``. An axis without entries says nothing, so values with one are left out.

    A model whose weights need more than half of the free memory is not run."""
    if session_bytes(model_weights(model)) > free_memory() // 2:
        return {}
    with malformed_graph_errors():
        copy = model.clone()
    twins = {v.name: v for node in copy.graph for v in node.outputs}
    shape_outputs = {v: _append(copy, SHAPE, [twins[v.name]]) for v in values}
    type_outputs = {v: _append_empty_part(copy, twins[v.name]) for v in values if v in untyped}
    copy.graph.outputs[:] = [*shape_outputs.values(), *type_outputs.values()]
    names = {v: str(output.name) for v, output in shape_outputs.items()}
    type_names = {v: str(output.name) for v, output in type_outputs.items()}
    try:
        specs = [_spec(value, inputs[str(value.name)]) for value in model.graph.inputs if value.name in inputs]
        feeds = random_feeds(specs, shapes=inputs)
        with temporary_session(copy, optimization="off", memory="least") as run:
            results = run(feeds)
    except UserError:  # it does not run at these sizes, or not here at all: the shapes stay unknown
        return {}
    return {
        value: MeasuredValue(
            tuple(int(n) for n in results[name]),
            ir.DataType.from_numpy(results[type_names[value]].dtype) if value in type_names else None,
        )
        for value, name in names.items()
        if bool((results[name] > 0).all())
    }


def _spec(value: ir.Value, shape: Shape) -> TensorSpec:
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        raise UserError(f"input {value.name!r} has no random values")
    return TensorSpec(str(value.name), value.dtype.numpy(), shape)


def _append(model: ir.Model, operator: str, inputs: Sequence[ir.Value]) -> ir.Value:
    """The output of a new node behind all others."""
    name = unused_name(f"{inputs[0].name}__{operator}", {str(node.name) for node in model.graph})
    node = make_node(operator, inputs, name=name, outputs=[name])
    model.graph.append(node)
    return node.outputs[0]


def _append_empty_part(model: ir.Model, value: ir.Value) -> ir.Value:
    """No entries of ``value``: nothing but its type."""

    def constant(array: AnyArray, name: str) -> ir.Value:
        return add_constant(model.graph, array, unused_name(name, model.graph.initializers))

    flat = _append(model, RESHAPE, [value, constant(np.asarray([-1]), "measured__flat")])
    return _append(model, GATHER, [flat, constant(np.asarray([], np.int64), "measured__nothing")])
