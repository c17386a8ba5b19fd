"""Sublayers by provenance: what lies between a read of the residual stream and the sum that returns to it.

A sum of activations is taken apart into its terms. The term that all others are computed from is the stream; each
other term is the branch of a sublayer. Normalizations before, inside or behind the branch, scales of its output and the
names that an exporter gave do not matter. Terms of one sum that read the same stream are parallel sublayers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    common_module_path,
    is_stored_constant,
    module_path,
    movement_root,
    node_macs,
    opset_version,
    parameter_count,
    reads_only_shape,
    unique_names,
    used_values,
)
from snpc.ops import lookup
from snpc.passes.canonicalization import original_name
from snpc.types import Sublayer, SublayerKind

NodeSet = set[ir.Node] | frozenset[ir.Node]


@dataclass(frozen=True)
class Branch:
    """One term of a sum, and the stream that it is computed from. ``sum``: the node that adds it."""

    sum: ir.Node
    value: ir.Value
    stream: ir.Value

    @property
    def rest(self) -> ir.Value | None:
        """What the sum is without the branch; None where it has more terms."""
        others = [value for value in self.sum.inputs if value is not self.value]
        return others[0] if len(others) == 1 else None


class SublayerGraph:
    """A graph with its sublayers. MACs are those at the sizes of ``facts``.

    ``ancestry``: value -> the nodes and inputs that its contents depend on, a bit for each. What a value takes from
    another one's shape alone is no dependence.
    """

    def __init__(self, model: ir.Model, facts: ShapeFacts) -> None:
        self.model, self.facts = model, facts
        self.nodes = list(model.graph)
        self.index = {node: number for number, node in enumerate(self.nodes)}
        self.macs = macs_by_node(model, facts)
        self.bits: dict[ir.Value, int] = {}
        self.ancestry: dict[ir.Value, int] = {}
        for number, value in enumerate(model.graph.inputs, start=len(self.nodes)):
            self.bits[value] = self.ancestry[value] = 1 << number
        for number, node in enumerate(self.nodes):
            upstream = 0
            if not reads_only_shape(node):
                for read in used_values(node):
                    upstream |= self.ancestry.get(read, 0)
                upstream |= (1 << number) if upstream else 0
            for made in node.outputs:
                self.bits[made], self.ancestry[made] = 1 << number, upstream

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """In the order of the graph."""
        return tuple(self.sublayer(name, branch) for name, branch in self.branches.items())

    @cached_property
    def branches(self) -> Mapping[str, Branch]:
        """Name -> branch, in the order of the graph."""
        found = [b for node in self.nodes for b in self.branches_of(node) if any(map(self.macs_of, self.inside(b)))]
        part = {b for outer in found for b in self.nested(outer, found) if len(self.nested(outer, found)) == 1}
        found = [branch for branch in found if branch not in part]
        paths = [self.module_path(branch) for branch in found]
        names = []
        for number, branch in enumerate(found):
            path, others = paths[number], paths[:number] + paths[number + 1 :]
            alone = path and not any(other == path or other.startswith(f"{path}.") for other in others)
            names.append(path if alone else f"{path or 'layer'}.{self.kind_of(branch)}")
        return dict(zip(unique_names(names), found, strict=True))

    def savings(self, names: Iterable[str]) -> tuple[int, int]:
        """(MACs, parameters) that go with these sublayers. What several of them read goes with all of them only."""
        return self.cost_of(self.unused_without([self.branches[name] for name in names]))

    def constants(self, names: Iterable[str]) -> set[str]:
        """Names of the constants that go with these sublayers: nothing else reads them."""
        unused = self.unused_without([self.branches[name] for name in names])
        return {str(value.name) for value in self.constants_of(unused)}

    def names_in(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        """(names of the nodes and values that are in this sublayer, with its sum; names of the values that they read
        beside the stream)."""
        branch = self.branches[name]
        nodes = self.inside(branch)
        made = {str(value.name) for node in (*nodes, branch.sum) for value in node.outputs}
        read = {str(value.name) for node in nodes for value in node.inputs if value is not None}
        return frozenset(made | {str(node.name) for node in nodes}), frozenset(read - made - {str(branch.stream.name)})

    # -- sums --------------------------------------------------------------------------------------------------------

    def branches_of(self, node: ir.Node) -> Iterator[Branch]:
        """The branches that end in the sum whose last addition is ``node``; none where it is part of a longer sum, or
        where no term is the stream of the others."""
        if not self.adds_activations(node) or self.is_inner(node) or is_score(node.outputs[0]):
            return
        terms = list(self.terms(node))
        streams = [self.nearest_stream(value, [other for _, other in terms]) for _, value in terms]
        if streams.count(None) == 1:
            for (adding, value), stream in zip(terms, streams, strict=True):
                if stream is not None:
                    yield Branch(adding, value, stream)

    def nearest_stream(self, value: ir.Value, terms: Iterable[ir.Value]) -> ir.Value | None:
        """What the last of the ``terms`` that ``value`` is computed from shows: itself, or the stream of which it is
        some rows."""
        streams = []
        for term in terms:
            root = movement_root(term)
            stream = root if self.ancestry.get(root) else term
            if term is not value and self.ancestry[value] & self.bits[stream]:
                streams.append(stream)
        return max(streams, key=lambda stream: self.ancestry[stream].bit_count(), default=None)

    def terms(self, node: ir.Node) -> Iterator[tuple[ir.Node, ir.Value]]:
        """(the node that adds it, the value) of each term of the sum that ends in ``node``."""
        for value in node.inputs:
            assert value is not None
            inner = value.producer()
            if inner is not None and self.adds_activations(inner) and self.is_inner(inner):
                yield from self.terms(inner)
            else:
                yield node, value

    def is_inner(self, node: ir.Node) -> bool:
        """Does nothing but a further addition to the same sum read it?"""
        uses, (total,) = list(node.outputs[0].uses()), node.outputs
        return len(uses) == 1 and not total.is_graph_output() and self.adds_activations(uses[0].node)

    def adds_activations(self, node: ir.Node) -> bool:
        """Is it the sum of two activations of its shape?"""
        spec = lookup(node.domain, node.op_type)
        if spec.effect != "add" or spec.kind != "pointwise" or spec.subtracts or len(node.inputs) != 2:
            return False
        shape = self.facts.shape.get(node.outputs[0])
        return bool(shape) and all(
            value is not None and self.ancestry.get(value) and self.facts.shape.get(value) == shape
            for value in node.inputs
        )

    # -- one branch --------------------------------------------------------------------------------------------------

    def inside(self, branch: Branch) -> list[ir.Node]:
        """The nodes between the stream and the sum, in the order of the graph."""
        upstream, stream = self.ancestry[branch.value], self.bits[branch.stream]
        return [
            node
            for number, node in enumerate(self.nodes[: self.index[branch.sum]])
            if upstream >> number & 1
            and self.ancestry[node.outputs[0]] & stream
            and node is not branch.stream.producer()
        ]

    def read_value(self, branch: Branch) -> ir.Value:
        """The one value that all its first products read, such as what its normalization gives, before its entries are
        laid out otherwise; the stream where they read several."""
        inside, first = self.inside(branch), set[ir.Value]()
        costly = sum(1 << self.index[node] for node in inside if self.macs_of(node))
        for node in inside:
            own = 1 << self.index[node]
            if self.macs_of(node) and not self.ancestry[node.outputs[0]] & costly & ~own:
                first |= {movement_root(value) for value in used_values(node) if self.follows(value, branch.stream)}
        (read,) = first if len(first) == 1 else [branch.stream]
        return read if self.follows(read, branch.stream) else branch.stream

    def follows(self, value: ir.Value, stream: ir.Value) -> bool:
        """Is it the stream, or computed from it?"""
        return value is stream or bool(self.ancestry.get(value, 0) & self.bits[stream])

    def nested(self, branch: Branch, found: Sequence[Branch]) -> list[Branch]:
        """The other branches of which the sum lies inside this one."""
        inside = set(self.inside(branch))
        return [other for other in found if other.sum in inside]

    def unused_without(self, branches: Sequence[Branch]) -> set[ir.Node]:
        """The nodes that no output depends on once these branches are not added any more."""
        gone = {(branch.sum, branch.value) for branch in branches}
        unused: set[ir.Node] = set()
        for node in reversed(self.nodes):
            uses = [(use.node, value) for value in node.outputs for use in value.uses()]
            kept = any(value.is_graph_output() for value in node.outputs)
            if uses and not kept and all(user in unused or (user, value) in gone for user, value in uses):
                unused.add(node)
        return unused

    def cost_of(self, nodes: NodeSet) -> tuple[int, int]:
        """(MACs, parameters) of nodes; parameters that no other node reads."""
        return sum(map(self.macs_of, nodes)), sum(map(parameter_count, self.constants_of(nodes)))

    def constants_of(self, nodes: NodeSet) -> list[ir.Value]:
        """The constants that no other node reads."""
        read = {value for node in nodes for value in node.inputs if value is not None and is_stored_constant(value)}
        return [value for value in read if all(use.node in nodes for use in value.uses())]

    def sublayer(self, name: str, branch: Branch) -> Sublayer:
        unused = self.unused_without([branch])
        macs, params = self.cost_of(unused)
        return Sublayer(
            name=name,
            kind=self.kind_of(branch),
            stream=str(branch.stream.name),
            branch=str(branch.value.name),
            read=str(self.read_value(branch).name),
            summed=str(branch.sum.outputs[0].name),
            macs=macs,
            params=params,
            reason=self.obstacle(branch, unused),
        )

    def obstacle(self, branch: Branch, unused: NodeSet) -> str:
        """Why the sublayer cannot go; "" where it can."""
        inside = self.inside(branch)
        if branch.rest is None:
            return "it is added more than once"
        if self.nested(branch, list(self.branches.values())):
            return "other layers lie inside it"
        for value in (value for node in inside for value in node.outputs):
            if value.is_graph_output():
                return f"its {value.name} is an output of the model"
        staying = next((node for node in inside if node not in unused and self.macs_of(node)), None)
        if staying is None:
            return ""
        reader = self.reader_outside(staying, {*inside, branch.sum})
        return f"{staying.outputs[0].name} is computed inside it and read outside" + (
            f", by {reader.op_type} {reader.name}" if reader is not None else ""
        )

    def reader_outside(self, node: ir.Node, inside: NodeSet) -> ir.Node | None:
        """The first node behind ``node`` that is not ``inside``."""
        todo, seen = [node], {node}
        while todo:
            for user in (use.node for value in todo.pop().outputs for use in value.uses()):
                if user not in inside:
                    return user
                if user not in seen:
                    seen.add(user)
                    todo.append(user)
        return None

    def kind_of(self, branch: Branch) -> SublayerKind:
        """Attention where two activations are multiplied, a convolution where a window slides, else feed-forward."""
        kind: SublayerKind = "feed-forward"
        for node in self.inside(branch):
            spec = lookup(node.domain, node.op_type)
            if spec.kind == "attention":
                return "attention"
            if spec.kind != "contraction" or not self.macs_of(node):
                continue
            left, right = (node.inputs[index] for index in spec.operands)
            if left is not None and right is not None and self.ancestry.get(left) and self.ancestry.get(right):
                return "attention"
            weight = self.facts.shape.get(right) if right is not None else None
            if spec.windowed and weight and max(weight[2:], default=1) > 1:
                kind = "convolution"
        return kind

    def module_path(self, branch: Branch) -> str:
        """The module path that the nodes with weights have in common; "" where they have none."""
        paths = []
        for node in self.inside(branch):
            names = [original_name(v) for v in node.inputs if v is not None and is_stored_constant(v)]
            if names and self.macs_of(node):
                paths.append(module_path(node, names))
        return ".".join(common_module_path([path for path in paths if path]))

    def macs_of(self, node: ir.Node) -> int:
        return self.macs[self.index[node]]


def macs_by_node(model: ir.Model, facts: ShapeFacts) -> list[int]:
    """MACs of each node, in the order of the graph; 0 where they cannot be counted."""
    return [node_macs(facts.call(node, opset_version(model, node.domain)), node.domain) or 0 for node in model.graph]


def is_score(value: ir.Value) -> bool:
    """Is it made into shares, as attention scores are to which a mask or a bias was added?"""
    return any(lookup(use.node.domain, use.node.op_type).makes_shares for use in value.uses())
