"""Inlines model-local functions. How many nodes that makes is counted first: functions that call others twice each grow
to 2^depth nodes from a file of two kilobytes."""

from __future__ import annotations

import graphlib
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.errors import UserError
from snpc.graph import MalformedGraphError, run_library_pass

FunctionId = ir.OperatorIdentifier

MAX_INLINED_NODES = 100_000
MAX_RENAMINGS = 50_000_000  # onnx-ir's inliner counts the copies of a name up from 1 for each: 15 s


class InlineFunctions(ir.passes.InPlacePass):
    """Replace calls of model-local functions by their bodies."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not model.functions:
            return ir.passes.PassResult(model, False)
        check_expansion(model)
        return run_library_pass(common.InlinePass(), model)


def check_expansion(model: ir.Model) -> None:
    """Raises UserError where inlining would not end in reasonable time, MalformedGraphError where it never would."""
    for domain, called, _ in model.functions:
        if domain in ("", "ai.onnx"):
            raise UserError(
                f"its function {called} stands in the domain of ONNX's own operators, where runtimes disagree on "
                "what is meant; give it another domain"
            )
    copies = function_copies(model)
    total = 0
    by_name: Counter[str] = Counter()
    for name, count in copies.items():
        nodes = list(model.functions[name].all_nodes())
        total += count * len(nodes)
        for node in nodes:
            by_name.update({f"node {node.name or ''}": count})
            by_name.update({f"value {value.name or ''}": count for value in node.outputs})
    renamings = sum(count * count // 2 for count in by_name.values())
    if total > MAX_INLINED_NODES or renamings > MAX_RENAMINGS:
        raise UserError(
            f"its {len(model.functions)} functions expand to {total} nodes, more than can be inlined here; "
            "inline them first with onnx.inliner.inline_local_functions"
        )


def function_copies(model: ir.Model) -> dict[FunctionId, int]:
    """How often the body of each function stands in the inlined graph."""
    calls = {name: called_functions(model, function) for name, function in model.functions.items()}
    try:
        callees_first = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(f"{domain}.{name}" for domain, name, _ in error.args[1][:6])
        raise MalformedGraphError(f"its functions call each other in a circle: {circle}") from None
    copies = called_functions(model, model.graph)
    for name in reversed(callees_first):
        for callee, count in calls[name].items():
            copies[callee] += copies[name] * count
    return dict(copies)


def called_functions(model: ir.Model, graph: ir.Graph | ir.Function) -> Counter[FunctionId]:
    """The functions that a graph calls, and how often; calls in its subgraphs count too."""
    return Counter(node.op_identifier() for node in graph.all_nodes() if node.op_identifier() in model.functions)
