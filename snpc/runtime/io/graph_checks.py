"""Checks of a graph against the rules of ONNX that later stages rely on: attributes, numbers of inputs, producers.

A graph that breaks them is refused by onnxruntime as well. Each error names the node.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from onnx import defs

from snpc.graph import MalformedGraphError, static_shape
from snpc.ops import lookup
from snpc.types import shape_text

NEWEST_OPSET = 1 << 20  # larger numbers are damage, and more than onnx takes


def check_graph(model: ir.Model) -> None:
    """Check a graph as it was read, its functions too. Raises MalformedGraphError."""
    check_references(model)
    check_schemas(model.graph.all_nodes(), model.opset_imports)
    for function in model.functions.values():
        check_schemas(function.all_nodes(), function.opset_imports)


def node_text(node: ir.Node) -> str:
    """A node for a message: its operator and its name, or that of its first output."""
    return f"{node.op_type} {node.name or next((str(v.name) for v in node.outputs), '')}".rstrip()


def check_references(model: ir.Model) -> None:
    """Refuse attributes that refer to those of a function where there is none around."""
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.is_ref():
                raise MalformedGraphError(
                    f"{node_text(node)} takes its {attribute.name} from the attribute {attribute.ref_attr_name} of a "
                    "function, but stands in none"
                )


def check_schemas(nodes: Iterable[ir.Node], opset_imports: Mapping[str, int]) -> None:
    """Refuse nodes of ONNX's own operators with attributes of another type, without one that they need, or with too few
    or too many inputs. What the installed onnx does not know is left alone."""
    version = min(max(opset_imports.get("", opset_imports.get("ai.onnx", 0)), 0), NEWEST_OPSET)
    for node in nodes:
        schema = None if node.domain else schema_at(node.op_type, version)
        if schema is None:
            continue
        if not schema.min_input <= len(node.inputs) <= schema.max_input:
            raise MalformedGraphError(f"{node_text(node)} has {len(node.inputs)} inputs")
        for name, expected in schema.attributes.items():
            attribute = node.attributes.get(name)
            if attribute is None:
                if expected.required:
                    raise MalformedGraphError(f"{node_text(node)} lacks its attribute {name}")
            elif attribute.type.name != (kind := str(expected.type).rpartition(".")[2]):
                found = attribute.type.name
                raise MalformedGraphError(f"the attribute {name} of {node_text(node)} is of type {found}, not {kind}")


@functools.cache
def schema_at(operator: str, version: int) -> defs.OpSchema | None:
    """The schema of an operator of the default domain; None where onnx has none for this version."""
    try:
        return defs.get_schema(operator, version, "")
    except (defs.SchemaError, TypeError):  # TypeError: damaged bytes in place of a name
        return None


def check_producers(model: ir.Model) -> None:
    """Refuse nodes that read what no node produces."""
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.graph is None:
                raise MalformedGraphError(f"{node.name} reads {value.name}, which no node produces")


def check_contractions(model: ir.Model) -> None:
    """Refuse products with a weight of no entries: onnxruntime dies of some."""
    for node in model.graph.all_nodes():
        for value in node.inputs if lookup(node.domain, node.op_type).kind == "contraction" else ():
            if value is not None and value.const_value is not None and 0 in static_shape(value.const_value):
                raise MalformedGraphError(
                    f"{node_text(node)} multiplies by {value.name}, which has no entries "
                    f"({shape_text(static_shape(value.const_value))})"
                )
