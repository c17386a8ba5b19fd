"""Turns residual streams: the same function, with every value x of a stream replaced by x Q for an orthogonal Q.

Weights that write the stream are multiplied by Q, weights that read it by Q'. Gains and biases of the normalizations
are moved into the weights behind them first. What is left of a normalization is a division by the root mean square,
which no Q changes. One that subtracts the mean of the channels takes part too: the mean is taken off by all that writes
the stream, and lies in the last column of Q, where it is zero from then on (Ashkboos et al., SliceGPT, ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, attribute_values, make_node, redirect_uses, replace_value, unused_name
from snpc.ops import lookup
from snpc.ops import names as op
from snpc.passes.canonicalization import EliminateDeadNodes
from snpc.passes.grouping import TracedGraph
from snpc.passes.rotation.find import ConstantAxis, ResidualStream, StreamReader
from snpc.passes.weights import Normalization, WeightEdits, apply_edits
from snpc.types import FloatArray


def turned_graph(source: TracedGraph, turns: Iterable[tuple[ResidualStream, FloatArray]]) -> ir.Model:
    """A copy of the graph in which each stream is turned by its matrix [D, D]: orthogonal, and where normalizations
    subtract a mean, with the same number in all entries of the last column."""
    turns, edits = list(turns), WeightEdits()
    for stream, basis in turns:
        edit_weights(source, stream, basis, edits)
    graph = apply_edits(source, edits)
    for stream, basis in turns:
        GraphTurn(graph, source, stream, basis).write()
    EliminateDeadNodes()(graph)
    return graph


def first_basis(stream: ResidualStream) -> FloatArray:
    """[D, D]: the simplest matrix by which the stream can be turned. Without a mean it is the identity, else the
    reflection that takes the last axis to the mean."""
    size = stream.group.size
    if not stream.centered:
        return np.eye(size)
    mean = np.full(size, size**-0.5)
    mirror = mean.copy()
    mirror[-1] -= 1.0
    return np.asarray(np.eye(size) - 2.0 * np.outer(mirror, mirror) / (mirror @ mirror))


def reader_weight(source: TracedGraph, reader: StreamReader) -> FloatArray:
    """[D, copies x outputs] in float64."""
    tensor = source.model.graph.initializers[reader.weight.tensor].const_value
    assert tensor is not None
    array = tensor.numpy().astype(np.float64)
    rows = np.moveaxis(array, reader.weight.axis, 0)
    rows = rows.reshape(reader.copies, len(rows) // reader.copies, -1)
    return np.moveaxis(rows, 1, 0).reshape(rows.shape[1], -1)


def norm_vector(source: TracedGraph, name: str | None, size: int, default: float) -> FloatArray:
    """[D]: the gain or bias of this name; ``default`` where there is none."""
    tensor = source.model.graph.initializers[name].const_value if name is not None else None
    return np.full(size, default) if tensor is None else tensor.numpy().astype(np.float64).reshape(-1)


def edit_weights(source: TracedGraph, stream: ResidualStream, basis: FloatArray, edits: WeightEdits) -> None:
    """Everything but the nodes: the constants of the stream, and biases behind its readers."""
    size = stream.group.size
    scale_of: dict[ConstantAxis, FloatArray] = {}
    for name, _, constants in stream.scales:
        scale_of |= dict.fromkeys(constants, norm_vector(source, name, size, 1.0))
    centering = np.eye(size) - 1.0 / size if stream.centered else np.eye(size)
    tied = {reader.weight for reader in stream.readers if stream.is_tied(reader.weight)}
    for place in stream.writers:
        matrix = basis if place in tied else scale_of.get(place, np.ones(size))[:, None] * (centering @ basis)
        edits.changes.setdefault(place.tensor, []).append(product_along(place.axis, matrix))
    turned: set[ConstantAxis] = set()
    for reader in stream.readers:
        norm = stream.normalizations[reader.norm] if reader.norm >= 0 else None
        gain = norm_vector(source, norm.gain if norm else None, size, 1.0)
        bias = norm_vector(source, norm.bias if norm else None, size, 0.0)
        if bias.any():
            edits.add_bias(reader.node, (bias @ reader_weight(source, reader)).reshape(reader.copies, -1).sum(0))
        if reader.weight not in turned and reader.weight not in tied:
            turned.add(reader.weight)
            matrix = gain[:, None] * basis
            edits.changes.setdefault(reader.weight.tensor, []).append(product_along(reader.weight.axis, matrix))
    for norm in stream.normalizations:
        if not norm.centered and norm.gain is not None:
            edits.changes.setdefault(norm.gain, []).append(np.ones_like)
        if not norm.centered and norm.bias is not None:
            edits.changes.setdefault(norm.bias, []).append(np.zeros_like)


def product_along(axis: int, matrix: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The product of an array with ``matrix`` [D, D], over ``axis`` of the array, where D channels lie once or several
    times."""

    def product(array: FloatArray) -> FloatArray:
        last = np.moveaxis(array, axis, -1)
        parts = last.reshape(*last.shape[:-1], -1, len(matrix)) @ matrix
        return np.moveaxis(parts.reshape(last.shape), -1, axis)

    return product


class GraphTurn:
    """Changes the nodes of one stream in a copy of ``source`` whose weights are turned already."""

    def __init__(self, graph: ir.Model, source: TracedGraph, stream: ResidualStream, basis: FloatArray) -> None:
        self.graph, self.source, self.stream, self.basis = graph.graph, source, stream, basis
        self.version = graph.graph.opset_imports.get("", 17)
        self.nodes = {str(node.name): node for node in self.graph}
        self.values = {str(value.name): value for node in self.graph for value in node.outputs}

    def write(self) -> None:
        for name, output, _ in self.stream.scales:
            node = self.values[output].producer()
            assert node is not None
            (rest,) = (value for value in node.inputs if value is not None and value.name != name)
            redirect_uses(list(node.outputs[0].uses()), rest)
            self.values[output] = rest
        for norm, value in zip(self.stream.normalizations, self.stream.sources, strict=True):
            if norm.centered:
                self.write_root_mean_square(norm, value)
        tied = {reader.weight for reader in self.stream.readers if self.stream.is_tied(reader.weight)}
        for reader in self.stream.readers:
            if reader.weight in tied:
                self.write_gain_in_basis(reader)
        for place, output in self.stream.tables:
            if place in tied and self.stream.centered:
                self.write_mask(self.values[output])

    def constant(self, array: FloatArray, name: str, dtype: ir.DataType) -> ir.Value:
        return add_constant(self.graph, array.astype(dtype.numpy()), unused_name(name, self.graph.initializers))

    def write_root_mean_square(self, norm: Normalization, source: str) -> None:
        """gain x / sqrt(mean x^2 + epsilon) in place of a normalization that subtracts a mean; the gain is all ones."""
        last = self.nodes[str(norm.nodes[-1].name)]
        (output,) = (value for value in last.outputs if value.name == norm.output.name)
        data = self.values[source]
        dtype = self.source.facts.types_by_name[str(norm.output.name)]
        single = ir.DataType.FLOAT
        stem = f"{norm.output.name}__rms"
        rank = len(self.source.trace.values[norm.output].shape)
        added: list[ir.Node] = []

        def node(kind: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
            added.append(make_node(kind, inputs, attributes, name=f"{stem}_{len(added)}"))
            return added[-1].outputs[0]

        wide = data if dtype == single else node(op.CAST, [data], to=int(single))
        square = node(op.POW, [wide, self.constant(np.array(2.0), f"{stem}_two", single)])
        if self.version >= op.REDUCTION_AXES_INPUT_SINCE[op.REDUCE_MEAN]:
            axes = add_constant(self.graph, np.array([norm.axis]), unused_name(f"{stem}_axes", self.graph.initializers))
            mean = node(op.REDUCE_MEAN, [square, axes], keepdims=1)
        else:
            mean = node(op.REDUCE_MEAN, [square], axes=[rank + norm.axis], keepdims=1)
        epsilon = self.constant(np.array(self.epsilon(norm)), f"{stem}_epsilon", single)
        root = node(op.SQRT, [node(op.ADD, [mean, epsilon])])
        normalized = node(op.DIV, [wide, root])
        normalized = normalized if dtype == single else node(op.CAST, [normalized], to=int(dtype))
        ones = np.ones([self.stream.group.size, *[1] * (-1 - norm.axis)])
        replaced = node(op.MUL, [normalized, self.constant(ones, f"{stem}_gain", dtype)])
        self.graph.insert_before(last, added)
        replace_value(output, replaced)
        self.values[str(replaced.name)] = replaced

    def epsilon(self, norm: Normalization) -> float:
        """What is added to the variance."""
        for node in norm.nodes:
            spec, given = lookup(node.domain, node.op_type), attribute_values(node)
            if spec.kind == "normalize":
                return float(given.get("epsilon", spec.epsilon))
            for value in node.inputs if spec.effect == "add" and not spec.subtracts else ():
                if value is not None and value.const_value is not None and value.const_value.size == 1:
                    return float(value.const_value.numpy().reshape(-1)[0])
        return 0.0

    def write_gain_in_basis(self, reader: StreamReader) -> None:
        """x Q' diag(gain) Q in front of a table that is written from too, which keeps its one basis."""
        norm = self.stream.normalizations[reader.norm] if reader.norm >= 0 else None
        gain = norm_vector(self.source, norm.gain if norm else None, self.stream.group.size, 1.0)
        node = self.nodes[reader.node]
        data = node.inputs[reader.data]
        assert data is not None
        if (gain == 1.0).all() and not self.stream.centered:
            return
        dtype = self.source.facts.types_by_name[str(data.name)]
        matrix = self.constant(self.basis.T @ (gain[:, None] * self.basis), f"{reader.node}__gain", dtype)
        product = make_node(op.MATMUL, [data, matrix], name=f"{reader.node}__gain")
        self.graph.insert_before(node, product)
        node.replace_input_with(reader.data, product.outputs[0])

    def write_mask(self, value: ir.Value) -> None:
        """Zero in the last channel, where the mean lies, of what comes from a table that keeps it."""
        node = value.producer()
        assert node is not None
        dtype = self.source.facts.types_by_name[str(value.name)]
        mask = np.ones(self.stream.group.size)
        mask[-1] = 0.0
        users = list(value.uses())
        product = make_node(
            op.MUL, [value, self.constant(mask, f"{value.name}__centered", dtype)], name=f"{value.name}__centered"
        )
        self.graph.insert_after(node, product)
        redirect_uses(users, product.outputs[0])
