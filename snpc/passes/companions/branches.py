"""Merged decoders: two models as branches of one ``If``, taken apart and put together again.

transformers.js loads ``decoder_model_merged.onnx``: its last node reads the prompt in one branch, and goes on from
caches in the other. Weights lie outside of both, once. A branch returns a constant for a cache that it does not make.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import (
    add_constant,
    data_dependent_values,
    decoder_input,
    find_presents,
    make_node,
    run_library_pass,
    unused_name,
)
from snpc.ops import IDENTITY, lookup


def branch_node(model: ir.Model) -> ir.Node | None:
    """The node with both decoders of a merged one, which makes all outputs; None of any other model. Quantized files
    have nodes in front of it, for weights and inputs that both branches may read."""
    nodes = [node for node in model.graph if lookup(node.domain, node.op_type).branches is not None]
    if len(nodes) != 1 or any(value.producer() is not nodes[0] for value in model.graph.outputs):
        return None
    switch = nodes[0].inputs[0]
    is_switch = switch is not None and switch.is_graph_input() and decoder_input(str(switch.name)) == "branch"
    return nodes[0] if is_switch else None


def split_branches(model: ir.Model) -> tuple[ir.Model, ir.Model] | None:
    """(the decoder without a past, the one with) of a merged decoder, each with what it needs; None of any other
    model."""
    if branch_node(model) is None:
        return None
    return branch_model(model, 1), branch_model(model, 0)


def branch_model(merged: ir.Model, branch: int) -> ir.Model:
    """A copy of one branch as a model. ``branch``: 0 where the switch is true, 1 where it is false."""
    model = merged.clone()
    graph, node = model.graph, branch_node(model)
    assert node is not None
    body, results = branch_body(node, branch), [str(value.name) for value in graph.outputs]
    outputs, nodes = list(body.outputs), list(body)
    constants = list(body.initializers.values())
    body.initializers.clear()
    body.outputs.clear()
    body.remove(nodes)
    graph.outputs.clear()
    graph.remove(node)
    release_inputs([node, *ir.traversal.RecursiveGraphIterator(branch_body(node, 1 - branch))])
    graph.extend(nodes)
    for value in constants:
        graph.register_initializer(value)
    for value, name in zip(outputs, results, strict=True):
        value.name = name
    graph.outputs.extend(outputs)
    made = data_dependent_values(model)
    for value in outputs:
        if value not in made:
            graph.outputs.remove(value)
    run_library_pass(common.RemoveUnusedNodesPass(), model)
    for value in [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]:
        graph.inputs.remove(value)
    return model


def release_inputs(nodes: Sequence[ir.Node]) -> None:
    """Let nodes that are dropped use nothing any more."""
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def branch_body(node: ir.Node, branch: int) -> ir.Graph:
    names = lookup(node.domain, node.op_type).branches
    assert names is not None
    return node.attributes[names[branch]].as_graph()


# -- together again --------------------------------------------------------------------------------------------------


def merge_branches(merged: ir.Model, first: ir.Model, second: ir.Model) -> ir.Model:
    """A merged decoder with the interface of ``merged``, whose branches are ``first``, without a past, and ``second``.
    Widths of inputs and outputs are theirs. Weights of equal contents are stored once."""
    node = branch_node(merged)
    assert node is not None
    parts = [second.clone(), first.clone()]  # in the order of the branches
    results = merged_outputs(merged, parts)
    inputs = merged_inputs(merged, parts)
    domains = {**first.graph.opset_imports, **second.graph.opset_imports, **merged.graph.opset_imports}
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=domains, name=str(merged.graph.name or "merged"))
    gather_constants(graph, parts)
    names = lookup(node.domain, node.op_type).branches
    assert names is not None
    switch = next(value for value in inputs if decoder_input(str(value.name)) == "branch")
    bodies = [branch_graph(graph, part, results, name) for part, name in zip(parts, names, strict=True)]
    joined = ir.Node(
        node.domain,
        node.op_type,
        [switch],
        [ir.AttrGraph(name, body) for name, body in zip(names, bodies, strict=True)],
        outputs=results,
        name=node.name,
    )
    graph.append(joined)
    graph.outputs.extend(results)
    return ir.Model(
        graph,
        ir_version=merged.ir_version,
        producer_name=first.producer_name,
        producer_version=first.producer_version,
        metadata_props=dict(first.metadata_props),
    )


def merged_outputs(merged: ir.Model, parts: Sequence[ir.Model]) -> list[ir.Value]:
    """New outputs under the names of ``merged``, of the types and shapes that a part declares."""
    declared = {str(value.name): value for part in parts for value in part.graph.outputs}
    own = [declared.get(str(value.name), value) for value in merged.graph.outputs]
    return [ir.Value(name=str(value.name), type=value.type, shape=value.shape) for value in own]


def merged_inputs(merged: ir.Model, parts: Sequence[ir.Model]) -> list[ir.Value]:
    """New inputs under the names of ``merged``, which all parts use in place of their own."""
    found = []
    for old in merged.graph.inputs:
        own = [v for part in parts for v in part.graph.inputs if v.name == old.name]
        declared = own[0] if own else old
        value = ir.Value(name=str(old.name), type=declared.type, shape=declared.shape)
        for part_input in own:
            part_input.replace_all_uses_with(value)
        found.append(value)
    return found


def gather_constants(graph: ir.Graph, parts: Sequence[ir.Model]) -> None:
    """Move the constants of all parts to ``graph``, those of equal contents once, under names that nothing else has."""
    taken = {str(value.name) for part in parts for value in inner_values(part)} | {str(v.name) for v in graph.inputs}
    known: dict[tuple[object, ...], ir.Value] = {}
    for part in parts:
        for value in list(part.graph.initializers.values()):
            tensor = value.const_value
            assert tensor is not None
            digest = hashlib.sha1(tensor.tobytes(), usedforsecurity=False).digest()
            key = (tensor.dtype, tuple(tensor.shape), digest)
            if key not in known:
                name = unused_name(str(value.name), taken)
                taken.add(name)
                known[key] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
                graph.register_initializer(known[key])
            value.replace_all_uses_with(known[key])


def inner_values(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph.all_nodes():
        yield from node.outputs


def branch_graph(graph: ir.Graph, part: ir.Model, results: Sequence[ir.Value], name: str) -> ir.Graph:
    """The body of a branch: the nodes of ``part``, with an empty constant of ``graph`` for every result that it does
    not make."""
    nodes, made = list(part.graph), {str(value.name): value for value in part.graph.outputs}
    part.graph.outputs.clear()
    part.graph.remove(nodes)
    outputs = []
    for result in results:
        own = made.get(str(result.name))
        if own is None or own.producer() is None:
            alias = make_node(IDENTITY, [own or empty_constant(graph, result)], name=f"{name}_{result.name}")
            nodes.append(alias)
            own = alias.outputs[0]
            own.type, own.shape = result.type, result.shape
        own.name = f"{name}_{result.name}"
        outputs.append(own)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def empty_constant(graph: ir.Graph, result: ir.Value) -> ir.Value:
    """A constant of the type of ``result``, of batch 0 and length 1. Exporters may not say the widths of a cache that
    they return; the past input that it becomes has them."""
    pasts = find_presents([str(value.name) for value in graph.inputs], [str(result.name)])
    declared = next((value for value in graph.inputs if value.name in pasts), result)
    assert declared.shape is not None and result.dtype is not None
    sizes = [dim if isinstance(dim, int) else int(axis > 0) for axis, dim in enumerate(declared.shape)]
    name = unused_name(f"{result.name}_empty", graph.initializers)
    return add_constant(graph, np.zeros(sizes, result.dtype.numpy()), name)
