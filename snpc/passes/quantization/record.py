"""Which float nodes, values and constants stand for the quantized ones: noted while a graph becomes float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from snpc.ops import Layout
from snpc.types import QuantizedForm, StoredConstant

Place = tuple[str, ir.Node, int]
"""A part of a stored constant, and the input of a node that reads it."""


@dataclass
class ConstantRecord:
    """A ``StoredConstant`` in the making. ``parts``: initializers."""

    layout: Layout
    parts: Mapping[str, ir.Value]
    attributes: Mapping[str, Any]
    axis: int = -1
    block: int = 0
    places: list[Place] = field(default_factory=list)
    reader: ir.Node | None = None


class FloatGraphRecord:
    """Takes down what was made of a graph, by its nodes and values; ``form`` gives names. Names are those from before:
    nodes and values are renamed on the way."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.node_names = {node: str(node.name) for node in graph}
        self.value_names = {value: str(value.name) for node in graph for value in node.outputs}
        self.stand_ins: dict[ir.Node, ir.Node] = {}
        self.values: dict[ir.Value, ir.Value] = {}
        self.quantized: set[ir.Value] = set()
        self.constants: dict[ir.Value, ConstantRecord] = {}

    def note_value(self, old: ir.Value, new: ir.Value, *, quantized: bool = False) -> None:
        """``new`` is the float value behind ``old``."""
        self.values[old] = new
        if quantized:
            self.quantized.add(old)

    def note_constant(self, made: ir.Value, record: ConstantRecord, places: Sequence[Place]) -> None:
        """The float constant ``made`` is what ``record`` says, read at ``places`` too."""
        self.constants.setdefault(made, record).places.extend(places)

    def note_reader(self, made: ir.Value, reader: ir.Node) -> None:
        """The float constant ``made`` is the output of ``reader``."""
        if made in self.constants:
            self.constants[made].reader = reader

    def form(self, stored: ir.Model) -> QuantizedForm:
        """By name, when the graph is float. ``stored``: the graph as it was."""
        present = list(self.graph)
        kept = {str(node.name): self.node_names[node] for node in present if node in self.node_names}
        gone = {value for node in set(self.node_names).difference(present) for value in node.outputs}
        values = {self.value_names[old]: str(new.name) for old, new in self.values.items() if old in gone}
        return QuantizedForm(
            stored,
            kept,
            {self.node_names[old]: str(new.name) for old, new in self.stand_ins.items()},
            values,
            frozenset(self.value_names[old] for old in self.quantized if old in self.value_names),
            {str(made.name): self.stored_constant(record) for made, record in self.constants.items()},
            frozenset(str(node.name) for node in present),
        )

    def stored_constant(self, record: ConstantRecord) -> StoredConstant:
        return StoredConstant(
            record.layout,
            {part: str(value.name) for part, value in record.parts.items()},
            tuple((part, self.node_names[node], index) for part, node, index in record.places),
            record.attributes,
            record.axis,
            record.block,
            "" if record.reader is None else self.node_names[record.reader],
        )
