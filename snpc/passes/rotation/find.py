"""Residual streams that can be turned: everything that touches their channels is linear, or normalizes them alike.

The graph is walked in order. A value of the stream is a sum of outputs of weights (*writers*). It is read by weights
(*readers*), directly or behind a normalization over all channels. Movement of tokens, sums, means over tokens, and
scales that are equal for all channels commute with a change of basis; a scale per channel behind a writer is folded
into that. Anything else works on single channels, and the stream keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import attribute_values, has_subgraphs
from snpc.ops import FILLING, OpSpec, lookup
from snpc.ops import names as op
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import Contraction, LabeledValue, varying_axes
from snpc.passes.weights import Normalization, affected_normalizations
from snpc.types import Group, IntArray

RAW = -1  # the state of a value of the stream that no normalization has changed; others: the normalization's number


class StreamKeepsChannels(Exception):
    """A residual stream cannot be turned; the message says why. ``entry``: a value, with channels on its last axis,
    behind which it could begin (``rotation.enter``)."""

    def __init__(self, reason: str, entry: str | None = None) -> None:
        super().__init__(reason)
        self.entry = entry


@dataclass(frozen=True)
class ConstantAxis:
    """One axis of one constant, which holds the channels of a stream."""

    tensor: str
    axis: int


@dataclass(frozen=True)
class StreamReader:
    """``node`` reads the stream by ``weight`` behind normalization number ``norm`` (RAW: as it is).

    ``data``: the index of the node's input that holds the stream. ``copies``: how often its channels lie on the axis of
    the weight, one after the other: behind a class token beside the mean of the others there are two."""

    weight: ConstantAxis
    node: str
    norm: int
    data: int
    copies: int = 1


@dataclass(frozen=True)
class ResidualStream:
    """The stream of ``group``, with all that has to change along with its basis.

    ``writers``: constants that make it, also embeddings, biases and learned tokens. ``sources``: the value of
    the stream that each normalization reads. ``tables``: (constant, value) of
    tables that are written from and read as weights too: such a table is turned once. ``scales``: (name of a constant,
    value behind it, constants in front) of scales per channel.
    """

    group: Group
    writers: tuple[ConstantAxis, ...]
    readers: tuple[StreamReader, ...]
    normalizations: tuple[Normalization, ...]
    sources: tuple[str, ...]
    tables: tuple[tuple[ConstantAxis, str], ...] = ()
    scales: tuple[tuple[str, str, tuple[ConstantAxis, ...]], ...] = ()

    @property
    def centered(self) -> bool:
        """Do its normalizations subtract the mean of the channels?"""
        return any(norm.centered for norm in self.normalizations)

    def is_tied(self, weight: ConstantAxis) -> bool:
        """Is it written from and read by the same axis of one constant?"""
        return weight in self.writers


def find_stream(traced_graph: TracedGraph, group: Group) -> ResidualStream:
    """The stream of a group of role "residual". Raises StreamKeepsChannels where it cannot be turned."""
    return StreamWalk(traced_graph, group).walk()


@dataclass
class StreamWalk:
    """The walk over the graph, with what it has found so far."""

    traced_graph: TracedGraph
    group: Group
    states: dict[ir.Value, int] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    writers: dict[ConstantAxis, None] = field(default_factory=dict)
    readers: list[StreamReader] = field(default_factory=list)
    tables: list[tuple[ConstantAxis, str]] = field(default_factory=list)
    scales: list[tuple[str, str, tuple[ConstantAxis, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        group, trace = self.group, self.traced_graph.trace
        if group.blocks != 1 or any(not is_whole(site.units, group.size) for site in group.sites):
            raise StreamKeepsChannels("a weight holds its channels in another order")
        axes = {(str(axis.constant.name), axis.axis): axis for axis in trace.table.axes}
        first = axes[group.sites[0].tensor, group.sites[0].axis]
        unit_of_label = self.traced_graph.units.unit_of_label
        units = unit_of_label[first.first_label : first.first_label + first.size]
        self.channel_of_label = np.full(len(unit_of_label), -1, np.int64)
        number_of_unit = np.full(int(unit_of_label.max()) + 1, -1, np.int64)
        number_of_unit[units] = np.arange(group.size)
        self.channel_of_label = number_of_unit[unit_of_label]
        removed = np.zeros(trace.table.count, bool)
        removed[units[0]] = True
        cut = self.traced_graph.units.removal(removed)
        self.normalizations = affected_normalizations(self.traced_graph, cut)
        self.norm_of_node = {node: number for number, norm in enumerate(self.normalizations) for node in norm.nodes}
        self.products: dict[ir.Node, list[Contraction]] = {}
        for contraction in trace.contractions:
            self.products.setdefault(contraction.node, []).append(contraction)

    def walk(self) -> ResidualStream:
        if not self.normalizations:
            raise StreamKeepsChannels("no normalization reads it")
        if any(has_subgraphs(node) for node in self.traced_graph.model.graph):
            raise StreamKeepsChannels("the graph has branches or loops")
        for node in self.traced_graph.model.graph:
            if node in self.norm_of_node:
                self.visit_normalization(node, self.norm_of_node[node])
            elif any(self.is_labeled(value) for value in node.inputs):
                self.visit(node)
        if len({norm.centered for norm in self.normalizations}) > 1:
            raise StreamKeepsChannels("some of its normalizations subtract a mean, and others do not")
        stream = ResidualStream(
            self.group,
            tuple(self.writers),
            tuple(self.readers),
            tuple(self.normalizations),
            tuple(self.sources[number] for number in range(len(self.normalizations))),
            tuple(self.tables),
            tuple(self.scales),
        )
        self.check(stream)
        return stream

    def check(self, stream: ResidualStream) -> None:
        """Raise StreamKeepsChannels where something is left that the walk does not account for."""
        if any(value in self.states for value in self.traced_graph.model.graph.outputs):
            raise StreamKeepsChannels("it is an output of the model")
        if stream.centered and any(reader.norm == RAW for reader in stream.readers):
            raise StreamKeepsChannels("a weight reads it in front of the normalizations, which subtract its mean")
        vectors = {name for norm in stream.normalizations for name in (norm.gain, norm.bias)}
        vectors |= {name for name, _, _ in stream.scales}
        known = {*stream.writers, *(reader.weight for reader in stream.readers)}
        for site in self.group.sites:
            if site.tensor not in vectors and ConstantAxis(site.tensor, site.axis) not in known:
                raise StreamKeepsChannels(f"{site.tensor} is read in a way that is not known")
        by_weight: dict[ConstantAxis, set[int]] = {}
        for reader in stream.readers:
            by_weight.setdefault(reader.weight, set()).add(reader.norm)
        shared = next((w for w, norms in by_weight.items() if len(norms) > 1 and not stream.is_tied(w)), None)
        if shared is not None:
            raise StreamKeepsChannels(f"{shared.tensor} is read behind several normalizations")

    # -- channels of values ----------------------------------------------------------------------------------------

    def channel_axes(self, value: ir.Value | None) -> tuple[int, ...]:
        """The axes of a value along which its channels lie. Raises StreamKeepsChannels where these are not all, or in
        another order."""
        labeled = self.traced_graph.trace.values.get(value) if value is not None else None
        return () if labeled is None else self.axes_of(labeled)

    def axes_of(self, labeled: LabeledValue) -> tuple[int, ...]:
        axes: list[int] = []
        for labels in labeled.factors:
            channels = self.channel_of_label[labels[labels >= 0]]
            if not (channels >= 0).any():
                continue
            varying = varying_axes(labels)
            if len(varying) != 1 or not is_whole(channels, self.group.size):
                raise StreamKeepsChannels(f"{labeled.name} holds its channels in another order, or parts of them")
            axes += varying
        return tuple(sorted(set(axes)))

    def copies(self, value: ir.Value) -> int:
        """How often the channels lie along their axis, one after the other."""
        (axis,) = self.channel_axes(value)
        return self.traced_graph.trace.values[value].shape[axis] // self.group.size

    def is_labeled(self, value: ir.Value | None) -> bool:
        return bool(self.channel_axes(value))

    def is_constant(self, value: ir.Value) -> bool:
        """Is it made of constants by movement alone? The weights of the experts that a router chooses are too."""
        while (node := value.producer()) is not None:
            moves = lookup(node.domain, node.op_type).kind == "movement"
            rest = () if node in self.traced_graph.trace.expert_reads else node.inputs[1:]
            if not moves or any(v is not None and v.const_value is None for v in rest) or node.inputs[0] is None:
                return False
            value = node.inputs[0]
        return value.const_value is not None

    def root_axis(self, value: ir.Value, axis: int) -> ConstantAxis:
        """The axis of a constant that lies along ``axis`` of a value that movement makes of it."""
        factor = next(
            f for f in self.traced_graph.trace.values[value].factors if varying_axes(f) == {axis} and (f >= 0).all()
        )
        label = int(factor.min())
        for labeled in self.traced_graph.trace.table.axes:
            if labeled.first_label <= label < labeled.first_label + labeled.size:
                return ConstantAxis(str(labeled.constant.name), labeled.axis)
        raise StreamKeepsChannels(f"{value.name} is no constant")

    # -- nodes -----------------------------------------------------------------------------------------------------

    def refuse(self, node: ir.Node) -> StreamKeepsChannels:
        reason = f"{node.op_type} {node.name} works on single channels of it"
        return StreamKeepsChannels(reason, self.entry_behind(node.outputs[0]))

    def entry_behind(self, value: ir.Value) -> str | None:
        """The first value that movement makes of this one and that has the channels on its last axis."""
        while self.is_labeled(value) and not value.is_graph_output():
            if self.channel_axes(value) == (len(self.traced_graph.trace.values[value].shape) - 1,):
                return str(value.name)
            users = list(value.consumers())
            if len(users) != 1 or lookup(users[0].domain, users[0].op_type).kind != "movement":
                return None
            value = users[0].outputs[0]
        return None

    def visit_normalization(self, node: ir.Node, number: int) -> None:
        norm, spec = self.normalizations[number], lookup(node.domain, node.op_type)
        outside = any(
            user not in norm.nodes
            for index, value in enumerate(node.outputs)
            if value is not norm.output and index not in spec.sum_outputs
            for user in value.consumers()
        )
        if outside and spec.kind == "pointwise":  # it stands in front: others read it too
            self.visit(node)
            return
        square = node.op_type == op.POW and is_two(node.inputs[1])
        vectors = [node.inputs[index] for index in spec.affine if index < len(node.inputs)]
        if any(value is not None and value.producer() is not None for value in vectors):
            raise StreamKeepsChannels(f"the gain or bias of {node.name} is computed")
        labeled = [value for value in node.inputs if value is not None and self.is_labeled(value)]
        if outside or (labeled and spec.kind == "pointwise" and spec.effect == "nonlinear" and not square):
            raise self.refuse(node)
        for value in labeled:
            if value.producer() is None:
                own = all(user in norm.nodes for user in value.consumers())
                if str(value.name) not in (norm.gain, norm.bias) or not own:
                    raise self.refuse(node)
            elif value in self.states and self.states[value] != RAW:
                entry = self.entry_behind(self.normalizations[self.states[value]].output)
                raise StreamKeepsChannels(f"{node.name} normalizes what was normalized before", entry)
            elif self.copies(value) > 1:
                raise self.refuse(node)
            elif value in self.states:
                self.sources.setdefault(number, str(value.name))
            elif value.producer() not in norm.nodes:
                raise self.refuse(node)
        for index, value in enumerate(node.outputs):
            if value is norm.output:
                self.states[value] = number
            elif index in spec.sum_outputs:
                if norm.centered:
                    raise self.refuse(node)
                self.states[value] = RAW

    def visit(self, node: ir.Node) -> None:
        """Follow the channels through a node that does not normalize."""
        spec = lookup(node.domain, node.op_type)
        uses = [use.node for value in node.outputs for use in value.uses()]
        if spec.kind == "shape" or (uses and all(map(reads_shape, uses))):
            return
        if spec.kind == "contraction":
            self.visit_product(node, spec)
        elif spec.effect == "scale" and spec.kind == "pointwise":
            self.visit_scale(node, spec)
        elif self.is_linear(node, spec):
            self.visit_linear(node)
        else:
            raise self.refuse(node)

    def is_linear(self, node: ir.Node, spec: OpSpec) -> bool:
        """Does it treat all channels alike, and linearly?"""
        labeled = [value for value in node.inputs if self.is_labeled(value)]
        if not all(self.is_labeled(value) for value in node.outputs if value.uses()):
            return False
        if spec.kind == "pointwise":
            return spec.effect == "same" or (spec.effect == "add" and len(labeled) == len(node.inputs))
        if spec.kind == "concat":
            return len(labeled) == len(node.inputs)
        return spec.kind == "movement" or node.op_type in (op.REDUCE_MEAN, op.REDUCE_SUM)

    def visit_linear(self, node: ir.Node) -> None:
        found = (self.state_of(value, node) for value in node.inputs if value is not None and self.is_labeled(value))
        states = {state for state in found if state is not None}
        if not states:
            return  # movement of a constant
        adds = lookup(node.domain, node.op_type).effect == "add"
        if len(states) > 1 or (states != {RAW} and len(node.inputs) > 1 and adds):
            reason = f"{node.op_type} {node.name} adds what was normalized to the stream"
            normalized = next(state for state in sorted(states) if state != RAW)
            raise StreamKeepsChannels(reason, self.entry_behind(self.normalizations[normalized].output))
        (state,) = states
        keeps_bias = (node.domain, node.op_type) not in FILLING and node.op_type != op.REDUCE_SUM
        if state != RAW and self.normalizations[state].bias is not None and not keeps_bias:
            raise self.refuse(node)
        for value in node.outputs:
            self.states[value] = state

    def state_of(self, value: ir.Value, node: ir.Node) -> int | None:
        """The state of an input of a linear node; None where constants are only moved."""
        if value in self.states:
            return self.states[value]
        if not self.is_constant(value):
            raise self.refuse(node)
        (axis,) = self.channel_axes(value)
        if self.is_constant(node.outputs[0]):
            return None
        root = self.root_axis(value, axis)
        self.writers[root] = None
        self.tables.append((root, str(node.outputs[0].name)))
        return RAW

    def visit_scale(self, node: ir.Node, spec: OpSpec) -> None:
        labeled = [value for value in node.inputs if value is not None and self.is_labeled(value)]
        (output,) = node.outputs
        if len(labeled) == 1 and not (spec.divides and labeled[0] is not node.inputs[0]):
            other = next((v for v in node.inputs if v is not labeled[0]), None)
            (axis,) = self.channel_axes(labeled[0])
            shape = self.traced_graph.facts.shape.get(other) if other is not None else None
            if shape is None:
                raise self.refuse(node)
            from_right = len(self.traced_graph.trace.values[labeled[0]].shape) - axis
            state = self.state_of(labeled[0], node)
            if state is None or (len(shape) >= from_right and shape[-from_right] != 1):
                raise self.refuse(node)
            if state != RAW and self.normalizations[state].bias is not None:
                raise self.refuse(node)
            self.states[output] = state
            return
        if len(labeled) != 2 or spec.divides:
            raise self.refuse(node)
        data, scale = labeled if labeled[1].producer() is None else reversed(labeled)
        if scale.const_value is None or len(scale.uses()) != 1 or self.states.get(data) != RAW:
            raise self.refuse(node)
        made = self.constants_in_front(data)
        if made is None:
            raise self.refuse(node)
        self.scales.append((str(scale.name), str(output.name), made))
        self.states[output] = RAW

    def constants_in_front(self, value: ir.Value) -> tuple[ConstantAxis, ...] | None:
        """The constants that a value which nothing else reads is linear in, each read once; None where it is not."""
        node = value.producer()
        if len(value.uses()) != 1 or value.is_graph_output():
            return None
        if node is None:
            return tuple(self.root_axis(value, axis) for axis in self.channel_axes(value)) or None
        spec = lookup(node.domain, node.op_type)
        linear = spec.kind in ("contraction", "movement") or spec.effect in ("add", "same")
        if not linear or (spec.kind == "contraction" and spec.has_activation):
            return None
        found: list[ConstantAxis] = []
        for part in (v for v in node.inputs if self.is_labeled(v)):
            assert part is not None
            if spec.kind == "contraction" and part.producer() is not None and part in self.states:
                continue  # what the writer reads
            inner = self.constants_in_front(part)
            if inner is None:
                return None
            found += inner
        return tuple(found) or None

    def visit_product(self, node: ir.Node, spec: OpSpec) -> None:
        products = self.products.get(node, [])
        if len(products) != 1 or spec.has_activation:
            raise self.refuse(node)
        (product,) = products
        letters = product.letters
        for side, own, other, inputs in (
            (product.left, letters.left, product.right, spec.operands),
            (product.right, letters.right, product.left, spec.operands[::-1]),
        ):
            for axis in self.axes_of(side):
                self.visit_operand(node, (side, other), own[axis] in letters.out, axis, inputs)
        if spec.bias is not None and len(node.inputs) > spec.bias and self.is_labeled(node.inputs[spec.bias]):
            bias = node.inputs[spec.bias]
            assert bias is not None
            if not self.is_constant(bias):
                raise self.refuse(node)
            (axis,) = self.channel_axes(bias)
            self.writers[self.root_axis(bias, axis)] = None
        if self.is_labeled(node.outputs[0]):
            self.states.setdefault(node.outputs[0], RAW)

    def visit_operand(
        self, node: ir.Node, sides: tuple[LabeledValue, LabeledValue], stays: bool, axis: int, inputs: tuple[int, int]
    ) -> None:
        """``axis`` of the first of ``sides``, which the product sums over, or which ``stays`` in its output."""
        side, other = sides
        value, data = node.inputs[inputs[0]], node.inputs[inputs[1]]
        if value is None or data is None or value.name != side.name or data.name != other.name:
            raise self.refuse(node)
        if self.is_constant(value):
            weight = self.root_axis(value, axis)
            if stays:
                self.writers[weight] = None
                return
            factors = (attribute_values(node).get(name, 1.0) for name in ("alpha", "beta"))
            if data not in self.states or self.products[node][0].letters.windowed or any(f != 1.0 for f in factors):
                raise self.refuse(node)
            rank, state = len(self.traced_graph.trace.values[data].shape), self.states[data]
            if self.channel_axes(data) != (rank - 1,) and self.needs_rows(weight, state):
                raise self.refuse(node)
            copies = self.copies(data)
            if copies > 1 and weight in self.writers:
                raise self.refuse(node)
            self.readers.append(StreamReader(weight, str(node.name), state, inputs[1], copies))
        elif stays and self.states.get(value) == RAW:
            self.states[node.outputs[0]] = RAW  # tokens are mixed
        elif stays or not self.is_constant(data):
            raise self.refuse(node)

    def needs_rows(self, weight: ConstantAxis, state: int) -> bool:
        """Does turning it add a bias behind a reader, or a product in front, which take channels on the last axis?"""
        return weight in self.writers or (state != RAW and self.normalizations[state].bias is not None)


def is_whole(units: IntArray, size: int) -> bool:
    """Do the units of an axis hold all of ``size`` in order, once or several times?"""
    return np.array_equal(units, np.tile(np.arange(size), max(1, len(units) // size)))


def is_two(value: ir.Value | None) -> bool:
    """Is it the constant 2?"""
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(-1)[0]) == 2.0


def reads_shape(node: ir.Node) -> bool:
    """Does it read the shape of its input only?"""
    return lookup(node.domain, node.op_type).kind == "shape"
