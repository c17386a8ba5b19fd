"""The float values behind quantized ones: constants that are dequantized, and activations before they were quantized.

An activation that was quantized is its float value again: rounding is undone. Its limits are not, where its range
starts at zero: quantizers drop a Relu or a Clip in front of such a range, which then does its work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, copy_node, make_node, static_shape, unused_name
from snpc.ops import CLIP, COMMUTING, FILLING, dequantize_array, lookup
from snpc.passes.quantization.not_negative import is_never_negative
from snpc.passes.quantization.record import ConstantRecord, FloatGraphRecord, Place
from snpc.types import AnyArray

SUFFIXES = re.compile(r"(_quantized|_quant|_matmul_Q\d+|_Q\d+|_q\d+)$")  # of names that quantizers write


class NoFloatForm(Exception):
    """Raised where no rule says which float value a quantized one stands for."""


@dataclass(frozen=True)
class Scaling:
    """The scale and the zero point of a quantized value (None: left out, or another node's), the axis that vectors of
    them belong to, and the length of blocks along it that share an entry (0: none do). ``places``: where they are
    read."""

    scale: ir.Value | None
    zero_point: ir.Value | None
    axis: int = -1
    block: int = 0
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class FloatSource:
    """A float value, and how it was quantized."""

    value: ir.Value
    scaling: Scaling


class FloatValues:
    """The float values behind the quantized ones of a graph. New nodes are put before the one that asks."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.record = FloatGraphRecord(graph)
        self.sources: dict[ir.Value, FloatSource] = {}
        self.constants: dict[tuple[object, ...], ir.Value] = {}
        self.names = {str(v.name) for node in graph for v in node.outputs} | set(graph.initializers)
        self.names |= {str(v.name) for v in graph.inputs}
        self.node_names = {str(node.name) for node in graph}

    def name(self, old: str | None) -> str:
        """A free name for what ``old`` is the quantized form of."""
        name = unused_name(SUFFIXES.sub("", str(old)), self.names)
        self.names.add(name)
        return name

    def node_name(self, node: ir.Node) -> str:
        """A free name for the node that ``node`` is the quantized form of: its own, which it gives up, where that does
        not tell of quantization."""
        old = str(node.name)
        name = SUFFIXES.sub("", old)
        if name == old:
            node.name = unused_name(f"{old}_quantized", self.node_names)
            self.node_names.add(str(node.name))
            return old
        name = unused_name(name, self.node_names)
        self.node_names.add(name)
        return name

    def float_of(
        self, value: ir.Value, scaling: Scaling, before: ir.Node, reader: tuple[ir.Node, int] | None = None
    ) -> ir.Value:
        """The float value behind ``value``, which is input ``reader``. Raises NoFloatForm."""
        source = self.sources.get(value)
        if source is not None:
            if not same_scaling(source.scaling, scaling):
                raise NoFloatForm(f"{value.name} is read with another scale than it is written with")
            return source.value
        if stored(value) is not None:
            return self.dequantized(value, scaling, [] if reader is None else [("codes", *reader)])
        return self.moved(value, scaling, before)

    def dequantized(self, value: ir.Value, scaling: Scaling, places: Sequence[Place]) -> ir.Value:
        """The constant that a quantized one stands for, read at ``places``."""
        quantized, scale, zero_point = stored(value), stored(scaling.scale), stored(scaling.zero_point)
        if quantized is None or scale is None or (scaling.zero_point is not None and zero_point is None):
            raise NoFloatForm(f"the scale of {value.name} is not stored in the file")
        axis, block = scaling.axis, scaling.block

        def contents() -> AnyArray:
            zero = None if zero_point is None else zero_point.numpy()
            return dequantize_array(quantized.numpy(), scale.numpy(), zero, axis, block)

        key = (value, scale, zero_point, axis, block)
        made = self.constant(key, contents, value, ir.TensorType(scale.dtype), ir.Shape(static_shape(quantized)))
        parts = {"codes": value, "scale": scaling.scale, "zero": scaling.zero_point}
        stored_parts = {part: v for part, v in parts.items() if v is not None}
        record = ConstantRecord("tensor", stored_parts, {}, axis, block)
        self.record.note_constant(made, record, [*places, *scaling.places])
        return made

    def constant(
        self,
        key: tuple[object, ...],
        contents: Callable[[], AnyArray],
        like: ir.Value,
        kind: ir.TensorType,
        shape: ir.Shape,
    ) -> ir.Value:
        """A float constant, computed each time it is read: a large model in float need not fit into memory. ``key``:
        what it is made of, the same for equal constants; ``like``: what it is named after."""
        identity = tuple(part if isinstance(part, int | str) else id(part) for part in key)
        if identity not in self.constants:
            name = self.name(like.name)
            tensor = ir.LazyTensor(lambda: ir.Tensor(contents(), dtype=kind.dtype), kind.dtype, shape, name=name)
            value = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
            self.graph.register_initializer(value)
            self.constants[identity] = value
        return self.constants[identity]

    def moved(self, value: ir.Value, scaling: Scaling, before: ir.Node) -> ir.Value:
        """The float value behind what a node moves, where all of it has one scale."""
        node, scale = value.producer(), stored(scaling.scale)
        if node is None or (scale is not None and scale.size != 1):
            raise NoFloatForm(f"{value.name} is an input, or moved with a scale per channel")
        operator = (node.domain, node.op_type)
        spec = lookup(*operator)
        if operator in FILLING or (spec.kind not in ("movement", "concat") and operator not in COMMUTING):
            raise NoFloatForm(f"{node.op_type} {node.name} has no float form")
        moving = range(len(node.inputs)) if spec.data is None or spec.kind == "concat" else spec.data
        inputs = list(node.inputs)
        for index in moving:
            read = inputs[index]
            if read is not None:
                inputs[index] = self.float_of(read, scaling, before, (node, index))
        names = [self.name(out.name) for out in node.outputs]
        copy = copy_node(node, inputs, name=self.node_name(node), outputs=names)
        self.graph.insert_before(before, copy)
        for out, new in zip(node.outputs, copy.outputs, strict=True):
            self.sources[out] = FloatSource(new, scaling)
            self.record.note_value(out, new, quantized=True)
        self.record.stand_ins[node] = copy
        return self.sources[value].value

    def quantize(self, quantized: ir.Value, value: ir.Value, scaling: Scaling, before: ir.Node) -> None:
        """Note that ``quantized`` is ``value``, rounded."""
        source = FloatSource(self.limited(value, scaling, before), scaling)
        self.sources[quantized] = source
        self.record.note_value(quantized, source.value, quantized=True)

    def limited(self, value: ir.Value, scaling: Scaling, before: ir.Node) -> ir.Value:
        """``value`` within the range of its quantized form, where that starts at zero and the value may not."""
        highest = highest_above_zero(scaling)
        if highest is None or value.producer() is None or is_never_negative(value):
            return value
        scale = stored(scaling.scale)
        assert scale is not None
        limits = [np.zeros((), scale.dtype.numpy()), np.asarray(highest, scale.dtype.numpy())]
        name = self.name(f"{value.name}_limited")
        bounds = [
            add_constant(self.graph, limit, self.name(f"{name}_{end}"))
            for limit, end in zip(limits, ("min", "max"), strict=True)
        ]
        node = make_node(CLIP, [value, *bounds], name=name, outputs=[name])
        self.graph.insert_before(before, node)
        return node.outputs[0]


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The contents of a constant that no input of the graph replaces."""
    return None if value is None or value.is_graph_input() else value.const_value


def highest_above_zero(scaling: Scaling) -> float | None:
    """The largest value of a range per tensor that starts at zero; None for other ranges."""
    scale, zero = stored(scaling.scale), stored(scaling.zero_point)
    if scale is None or scale.size != 1 or (scaling.zero_point is not None and zero is None):
        return None
    dtype = ir.DataType.UINT8 if zero is None else zero.dtype
    if not dtype.is_integer():
        return None
    limits = ml_dtypes.iinfo(dtype.numpy())  # type: ignore[no-untyped-call]
    lowest = 0 if zero is None else int(zero.numpy().reshape(-1)[0])
    if lowest != int(limits.min):
        return None
    return float(scale.numpy().reshape(-1)[0]) * (int(limits.max) - int(limits.min))


def same_scaling(one: Scaling, other: Scaling) -> bool:
    """Whether both stand for the same scale and zero point; a scale that is left out is the other's."""
    scales = one.scale is None or other.scale is None or same_contents(one.scale, other.scale)
    return scales and same_contents(one.zero_point, other.zero_point)


def same_contents(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are one, or constants of the same numbers. A zero point that is left out is zero."""
    if one is other:
        return True
    arrays = [np.zeros(1) if v is None else None if (t := stored(v)) is None else t.numpy() for v in (one, other)]
    left, right = (None if a is None else np.asarray(a).reshape(-1).astype(np.float64) for a in arrays)
    if left is None or right is None:
        return False
    return bool(len(left) == len(right) and (left == right).all()) or bool(not left.any() and not right.any())
