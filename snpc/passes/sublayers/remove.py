"""Removal of whole sublayers from a graph, and the same in place: the oracle of the removal, and the graph of trials.

A removed sublayer adds nothing to the stream any more, or what stands for it: a constant, the mean of what it added, or
an affine map of what it read. In the first case its sum is gone too, and what read it reads the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, opset_version, redirect_uses, replace_graph_output, unused_name
from snpc.ops import names as op
from snpc.passes.canonicalization import EliminateDeadNodes
from snpc.passes.grouping import TracedGraph
from snpc.passes.sublayers.substitutes import NO_SUBSTITUTES, Substitute, Substitutes, SubstituteWriter
from snpc.types import FloatArray, Sublayer

ZERO = Substitute(np.zeros(1))


@dataclass(frozen=True)
class SublayerRemoval:
    """The sublayers that are gone from a graph. ``substitutes``: name -> what stands for one; nothing stands for the
    others. ``source``: the graph that still has them.

    ``continued``: value of the stream in front of a removed sublayer -> what it stands for behind it."""

    sublayers: tuple[Sublayer, ...]
    substitutes: Substitutes
    source: TracedGraph = field(repr=False, compare=False)
    continued: Mapping[str, Continuation] = field(repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sublayer.name for sublayer in self.sublayers)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Each name, with what stands for the sublayer."""
        stands = {name: f" ({substitute.describe()})" for name, substitute in self.substitutes.items()}
        return tuple(f"{name}{stands.get(name, '')}" for name in self.names)

    def stands_for(self, name: str) -> Continuation:
        """What a value of the stream stands for in ``source``: that of its name, or the sum behind the sublayers that
        are gone there, less the constants that still follow."""
        found = self.continued.get(name)
        if found is None or found.added is None:
            return found or Continuation(name)
        behind = self.stands_for(found.summed)
        return Continuation(behind.summed, found.added + (0.0 if behind.added is None else behind.added))


@dataclass(frozen=True)
class Continuation:
    """The sum ``summed``, less the constant ``added`` [D] where there is one."""

    summed: str
    added: FloatArray | None = None


def without_sublayers(
    source: TracedGraph, sublayers: Iterable[Sublayer], substitutes: Substitutes = NO_SUBSTITUTES
) -> tuple[ir.Model, Mapping[str, Continuation]]:
    """(a copy of the graph that lacks these sublayers and all that only they read, ``SublayerRemoval.continued``).

    A map stands for what its sublayer adds to every token, so the stream in front of it means what it meant."""
    copy = source.model.clone()
    writer = SubstituteWriter(copy.graph, source.facts.types_by_name, opset_version(copy))
    removed = {(sublayer.summed, sublayer.branch): sublayer for sublayer in sublayers}
    nothing: set[ir.Value] = set()  # values that are the sum of no term any more
    continued: dict[str, Continuation] = {}
    for node in list(copy.graph):
        total = node.outputs[0]
        gone = []
        for index, value in enumerate(node.inputs):
            sublayer = removed.get((str(total.name), str(value.name))) if value is not None else None
            if sublayer is not None and sublayer.name in substitutes:
                rest, substitute = node.inputs[1 - index], substitutes[sublayer.name]
                assert rest is not None
                if substitute.map is None:
                    continued[str(rest.name)] = Continuation(str(total.name), substitute.constant)
                node.replace_input_with(index, writer.add(node, sublayer, substitute))
            elif sublayer is not None or value in nothing:
                gone.append(index)
        if len(gone) == len(node.inputs) and gone:
            nothing.add(total)
        elif gone:
            rest = node.inputs[1 - gone[0]]
            assert rest is not None
            bypass(copy.graph, node, rest)
            continued[str(rest.name)] = Continuation(str(total.name))
    EliminateDeadNodes()(copy)
    return copy, continued


def bypass(graph: ir.Graph, node: ir.Node, rest: ir.Value) -> None:
    """Let what reads the sum ``node`` read ``rest``; an output of the graph keeps its name."""
    total = node.outputs[0]
    redirect_uses(list(total.uses()), rest)
    if total.is_graph_output():
        passed = make_node(op.IDENTITY, [rest], name=unused_name(f"{node.name}_without", node_names(graph)))
        passed.outputs[0].type, passed.outputs[0].shape = total.type, total.shape
        graph.insert_after(node, passed)
        name = str(total.name)
        replace_graph_output(graph, total, passed.outputs[0], unused_name(f"{name}_removed", value_names(graph)))


def with_switches(
    source: TracedGraph, sublayers: Iterable[Sublayer], substitutes: Substitutes = NO_SUBSTITUTES
) -> ir.Model:
    """A copy of the graph at full size with an input per sublayer, ``switch_name``, a bool []: does it add its output?
    Where it does not, it adds what stands for it."""
    copy = source.model.clone()
    writer = SubstituteWriter(copy.graph, source.facts.types_by_name, opset_version(copy))
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    for sublayer in sublayers:
        total, branch = values[sublayer.summed], values[sublayer.branch]
        node = total.producer()
        assert node is not None
        switch = ir.Value(name=switch_name(sublayer.name), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        copy.graph.inputs.append(switch)
        substitute = writer.add(node, sublayer, substitutes.get(sublayer.name, ZERO))
        chosen = make_node(op.WHERE, [switch, branch, substitute], name=f"{switch.name}_where")
        copy.graph.insert_before(node, chosen)
        node.replace_input_with(next(k for k, value in enumerate(node.inputs) if value is branch), chosen.outputs[0])
    return copy


def with_layer_scales(source: TracedGraph, sublayers: Iterable[Sublayer]) -> ir.Model:
    """A copy of the graph in which what each sublayer adds is multiplied by a constant of its own, ones [D] that are
    called ``layer_scale_name``."""
    copy, types = source.model.clone(), source.facts.types_by_name
    shapes = source.facts.shapes_by_name
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    for sublayer in sublayers:
        branch, node = values[sublayer.branch], values[sublayer.summed].producer()
        assert node is not None
        ones = np.ones(shapes[sublayer.branch][-1], types[sublayer.branch].numpy())
        factor = add_constant(copy.graph, ones, layer_scale_name(sublayer.name))
        scaled = make_node(op.MUL, [branch, factor], name=f"{factor.name}_mul")
        copy.graph.insert_before(node, scaled)
        node.replace_input_with(next(k for k, value in enumerate(node.inputs) if value is branch), scaled.outputs[0])
    return copy


def layer_scale_name(sublayer: str) -> str:
    """The constant that what the sublayer of this name adds is multiplied by."""
    return f"snpc_scale_{sublayer}"


def switch_name(sublayer: str) -> str:
    """The input that says whether the sublayer of this name adds its output."""
    return f"snpc_on_{sublayer}"


def value_names(graph: ir.Graph) -> set[str]:
    return {str(value.name) for node in graph for value in node.outputs}


def node_names(graph: ir.Graph) -> set[str]:
    return {str(node.name) for node in graph}
