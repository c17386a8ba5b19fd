"""Removal of whole sublayers from a graph, and the same in place: the oracle of the removal, and the graph of trials.

A removed sublayer adds nothing to the stream any more, or a constant, the mean of what it added. In the first case its
sum is gone too, and what read it reads the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, redirect_uses, replace_graph_output, unused_name
from snpc.ops import names as op
from snpc.passes.canonicalization import EliminateDeadNodes
from snpc.passes.grouping import TracedGraph
from snpc.types import FloatArray, Sublayer

Means = Mapping[str, FloatArray]
NO_MEANS: Means = MappingProxyType({})


@dataclass(frozen=True)
class SublayerRemoval:
    """The sublayers that are gone from a graph. ``means``: name -> [D], the constant that stands for one; nothing
    stands for the others. ``source``: the graph that still has them.

    ``continued``: value of the stream in front of a removed sublayer -> what it stands for behind it."""

    sublayers: tuple[Sublayer, ...]
    means: Means
    source: TracedGraph = field(repr=False, compare=False)
    continued: Mapping[str, Continuation] = field(repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sublayer.name for sublayer in self.sublayers)

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
    source: TracedGraph, sublayers: Iterable[Sublayer], means: Means = NO_MEANS
) -> tuple[ir.Model, Mapping[str, Continuation]]:
    """(a copy of the graph that lacks these sublayers and all that only they read, ``SublayerRemoval.continued``)."""
    copy, types = source.model.clone(), source.facts.types_by_name
    removed = {(sublayer.summed, sublayer.branch): sublayer for sublayer in sublayers}
    nothing: set[ir.Value] = set()  # values that are the sum of no term any more
    continued: dict[str, Continuation] = {}
    for node in list(copy.graph):
        total = node.outputs[0]
        gone = []
        for index, value in enumerate(node.inputs):
            sublayer = removed.get((str(total.name), str(value.name))) if value is not None else None
            if sublayer is not None and sublayer.name in means:
                rest = node.inputs[1 - index]
                assert rest is not None
                continued[str(rest.name)] = Continuation(str(total.name), means[sublayer.name])
                node.replace_input_with(index, mean_constant(copy.graph, sublayer, means[sublayer.name], types))
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


def with_switches(source: TracedGraph, sublayers: Iterable[Sublayer], means: Means = NO_MEANS) -> ir.Model:
    """A copy of the graph at full size with an input per sublayer, ``switch_name``, a bool []: does it add its output?
    Where it does not, it adds what stands for it."""
    copy, types = source.model.clone(), source.facts.types_by_name
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    for sublayer in sublayers:
        total, branch = values[sublayer.summed], values[sublayer.branch]
        node = total.producer()
        assert node is not None
        switch = ir.Value(name=switch_name(sublayer.name), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        copy.graph.inputs.append(switch)
        substitute = mean_constant(copy.graph, sublayer, means.get(sublayer.name, np.zeros(1)), types)
        chosen = make_node(op.WHERE, [switch, branch, substitute], name=f"{switch.name}_where")
        copy.graph.insert_before(node, chosen)
        node.replace_input_with(next(k for k, value in enumerate(node.inputs) if value is branch), chosen.outputs[0])
    return copy


def switch_name(sublayer: str) -> str:
    """The input that says whether the sublayer of this name adds its output."""
    return f"snpc_on_{sublayer}"


def mean_constant(graph: ir.Graph, sublayer: Sublayer, mean: FloatArray, types: Mapping[str, ir.DataType]) -> ir.Value:
    """What stands for a sublayer, in the type of what it adds."""
    contents = mean.astype(types[sublayer.branch].numpy())
    return add_constant(graph, contents, unused_name(f"{sublayer.name}.mean", graph.initializers))


def value_names(graph: ir.Graph) -> set[str]:
    return {str(value.name) for node in graph for value in node.outputs}


def node_names(graph: ir.Graph) -> set[str]:
    return {str(node.name) for node in graph}
