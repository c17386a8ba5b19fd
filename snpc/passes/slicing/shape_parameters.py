"""Writes recomputed parameters into the graph: a constant, or the smallest change of the nodes that compute one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import (
    Attribute,
    ShapeFacts,
    add_constant,
    alternative_dim_sizes,
    infer_graph,
    infer_node,
    make_node,
    record_constant,
    unused_name,
)
from snpc.ops import CONCAT, DIV, MUL, WHERE, lookup
from snpc.types import AnyArray


class ShapeParameterEditor:
    """Sets parameters of one sliced model. Equal constants are shared; constants with other consumers stay."""

    def __init__(
        self, copy: ir.Model, model: ir.Model, before: ShapeFacts, after: ShapeFacts, sizes: Mapping[str, int]
    ) -> None:
        self.copy, self.model, self.before, self.after, self.sizes = copy, model, before, after, sizes
        self.constants: dict[tuple[bytes, str, tuple[int, ...]], ir.Value] = {}
        self._elsewhere: ShapeFacts | None = None

    def constant(self, array: AnyArray, hint: str) -> ir.Value:
        key = (array.tobytes(), str(array.dtype), array.shape)
        if key not in self.constants:
            taken = {*self.copy.graph.initializers, *(value.name for value in self.copy.graph.inputs)}
            value = add_constant(self.copy.graph, array.copy(order="C"), unused_name(f"{hint}__cut", taken))
            record_constant(self.after, value)
            self.constants[key] = value
        return self.constants[key]

    def facts_at_other_sizes(self) -> ShapeFacts:
        """Facts of the original at other sizes of its dynamic dimensions: what differs there depends on one of them."""
        if self._elsewhere is None:
            self._elsewhere = infer_graph(self.model, alternative_dim_sizes(self.sizes))
        return self._elsewhere

    def set_input(self, old: ir.Node, node: ir.Node, index: int, target: AnyArray) -> None:
        """Make input ``index`` of ``node`` hold ``target``. Entries that are right already stay computed."""
        current = node.inputs[index] if index < len(node.inputs) else None
        hint = f"{node.outputs[0].name}_{index}"
        if current is None or current not in self.after.value:
            self.replace_input(node, index, self.constant(target, hint))
            return
        array = self.after.value[current]
        if array.shape == target.shape and bool((array == target).all()):
            return
        if array.shape != target.shape and not (
            current.is_initializer() or bool(self.static_entries(old.inputs[index]).all())
        ):
            raise CheckFailed(f"{node.op_type} {node.name}: {current.name} depends on a dynamic axis and cannot be cut")
        if current.is_initializer() or array.shape != target.shape:
            self.replace_input(node, index, self.constant(target.astype(array.dtype), hint))
            return
        source = old.inputs[index]
        assert source is not None
        fixed = self.static_entries(source)
        wrong = array != target
        if bool(fixed.all()):
            self.replace_input(node, index, self.constant(target.astype(array.dtype), hint))
        elif bool(fixed[wrong].all()):
            self.replace_input(node, index, self.overwrite_entries(node, current, wrong, target, hint))
        else:
            self.replace_input(node, index, self.rescale_entries(node, current, array, target, hint))

    def static_entries(self, source: ir.Value | None) -> AnyArray:
        """Which entries of a computed parameter are the same at all sizes of the dynamic dimensions."""
        assert source is not None
        values, other_values = self.before.value[source], self.facts_at_other_sizes().value.get(source)
        if other_values is None or other_values.shape != values.shape:
            return np.zeros(values.shape, bool)
        return np.asarray(values == other_values)

    def replace_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        while len(node.inputs) <= index:
            node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(index, value)

    def insert(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> ir.Value:
        """The output of a new node ahead of ``before``; both have ``name``."""
        node = make_node(op, inputs, attributes, name=name, outputs=[name])
        before.prepend(node)
        infer_node(self.after, node, self.copy, self.sizes)
        return node.outputs[0]

    def overwrite_entries(
        self, node: ir.Node, current: ir.Value, wrong: AnyArray, target: AnyArray, hint: str
    ) -> ir.Value:
        """Constants in the entries that changed, computed ones elsewhere: with a Concat as before, or with a Where."""
        producer = current.producer()
        dtype = self.after.value[current].dtype
        if producer is not None and lookup(producer.domain, producer.op_type).kind == "concat":
            pieces: list[ir.Value] = []
            position = 0
            for piece in producer.inputs:
                size = self.after.value[piece].size if piece in self.after.value else -1
                if size < 0 or piece is None:
                    break
                part = slice(position, position + size)
                changed = bool(wrong[part].any())
                pieces.append(self.constant(target[part].astype(dtype), f"{hint}_{position}") if changed else piece)
                position += size
            whole_pieces = position == target.size and self.splits_between_pieces(producer, wrong)
            if whole_pieces:
                return self.insert(node, CONCAT, pieces, self.unused_node_name(f"{hint}__shape"), {"axis": 0})
        mask = self.constant(wrong, f"{hint}_which")
        values = self.constant(np.where(wrong, target, 0).astype(dtype), f"{hint}_what")
        return self.insert(node, WHERE, [mask, values, current], self.unused_node_name(f"{hint}__shape"))

    def splits_between_pieces(self, producer: ir.Node, wrong: AnyArray) -> bool:
        """Does no input of the Concat hold both an entry that changed and one that must stay computed?"""
        position = 0
        for piece in producer.inputs:
            size = self.after.value[piece].size  # type: ignore[index]
            part = wrong[position : position + size]
            if part.any() and not part.all():
                return False
            position += size
        return True

    def rescale_entries(
        self, node: ir.Node, current: ir.Value, array: AnyArray, target: AnyArray, hint: str
    ) -> ir.Value:
        """Multiply by the ratio of new to old size, entry by entry: for an entry such as batch x heads."""
        if (array <= 0).any() and (target != array)[array <= 0].any():
            raise CheckFailed(f"{node.op_type} {node.name}: a computed size cannot be recomputed")
        common = np.maximum(np.gcd(np.abs(array), np.abs(target)), 1)
        down = self.constant(np.where(target == array, 1, array // common).astype(array.dtype), f"{hint}_over")
        times = np.where(target == array, 1, target // common).astype(array.dtype)
        up = self.constant(times, f"{hint}_times")
        product = self.insert(node, MUL, [current, up], self.unused_node_name(f"{hint}__times"))
        return self.insert(node, DIV, [product, down], self.unused_node_name(f"{hint}__shape"))

    def unused_node_name(self, name: str) -> str:
        return unused_name(name, {str(node.name) for node in self.copy.graph})
