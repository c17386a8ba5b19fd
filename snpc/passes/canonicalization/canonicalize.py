"""The canonical form of a graph, which every later stage reads: a private copy of the model in which

- model-local functions are inlined, branches that always go the same way are replaced by their body, ``Constant``
  nodes are initializers, and an initializer has no other name (exporters write ``Identity`` for biases that are equal),
- nodes and initializers that no output depends on are gone, as runtimes drop them too, and zeros that are added,
- a vector with several consumers, and any constant with several pointwise consumers, is one initializer per consumer
  (exporters merge equal biases of unrelated layers; a weight shared on purpose stays shared),
- Einsum nodes have two operands, and fused attention holds no norms of queries and keys,
- nodes stand in topological order and every node has a name,
- KV caches of fused attention have a static width,
- rotary tables are read through selections of columns, one per use.

The copies share their bytes, and ``finalize`` merges those that end equal, so a model that is not cut is written as it
was read.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.graph import GraphPass, PassObserver, run_library_pass, run_passes
from snpc.ops import IDENTITY
from snpc.passes.canonicalization.eliminate_dead_nodes import EliminateDeadNodes
from snpc.passes.canonicalization.eliminate_zero_terms import EliminateZeroTerms
from snpc.passes.canonicalization.expand_einsum import ExpandEinsum
from snpc.passes.canonicalization.expand_head_norms import ExpandHeadNorms
from snpc.passes.canonicalization.inline_branches import InlineBranches
from snpc.passes.canonicalization.inline_functions import InlineFunctions
from snpc.passes.canonicalization.rotary_tables import ForkRotaryTables
from snpc.passes.canonicalization.shared_constants import ForkSharedConstants
from snpc.passes.canonicalization.static_cache_widths import DeclareCacheWidths


class LiftConstants(ir.passes.InPlacePass):
    """Turn every ``Constant`` node into an initializer, of whatever size and type."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        return run_library_pass(lift, model)


class SortNodes(ir.passes.InPlacePass):
    """Put nodes into topological order."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return run_library_pass(common.TopologicalSortPass(), model)


class EliminateInitializerAliases(ir.passes.InPlacePass):
    """Remove ``Identity`` nodes that give an initializer a second name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            if (node.domain, node.op_type) != ("", IDENTITY) or node.outputs[0].is_graph_output():
                continue
            value = node.inputs[0]
            if value is not None and value.is_initializer() and value.graph is graph:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


class NameNodes(ir.passes.InPlacePass):
    """Give every node a name of its own: ``<operator>_<index>`` to those without, the index behind a repeated one."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        taken: set[str] = set()
        modified = False
        for index, node in enumerate(model.graph):
            name = node.name or f"{node.op_type}_{index}"
            while name in taken:
                name = f"{name}_{index}"
            modified = modified or node.name != name
            node.name = name
            taken.add(name)
        return ir.passes.PassResult(model, modified)


FORK_SHARED_CONSTANTS = GraphPass(
    "fork-shared-constants",
    "canonicalize",
    ForkSharedConstants,
    "gives each consumer of a shared vector a copy of its own",
    "last: the copies are named after initializers that stay",
)

CANONICALIZATION_PASSES = (
    GraphPass(
        "inline-functions",
        "canonicalize",
        InlineFunctions,
        "replaces calls of model-local functions by their bodies",
        "first: all later passes look at operators only",
    ),
    GraphPass(
        "lift-constants",
        "canonicalize",
        LiftConstants,
        "turns Constant nodes into initializers",
        "after inlining, as functions hold constants too; before branches, whose conditions are constants",
    ),
    GraphPass(
        "sort-nodes",
        "canonicalize",
        SortNodes,
        "puts nodes into topological order",
        "shape inference, which the next pass runs, goes through the nodes once",
    ),
    GraphPass(
        "inline-branches",
        "canonicalize",
        InlineBranches,
        "replaces an If whose condition is the same for all inputs by the branch that is taken",
        "before the passes that look at nodes of the main graph: it adds nodes and initializers to it",
    ),
    GraphPass(
        "eliminate-initializer-aliases",
        "canonicalize",
        EliminateInitializerAliases,
        "removes Identity nodes that give an initializer a second name",
        "after branches, which leave Identity nodes; before forking, which must see all consumers of a constant",
    ),
    GraphPass(
        "eliminate-zero-terms",
        "canonicalize",
        EliminateZeroTerms,
        "removes zeros that are added, as exporters write them for baddbmm and for queries that start at zero",
        "before dead nodes, as what makes the zeros is one then",
    ),
    GraphPass(
        "eliminate-dead-nodes",
        "canonicalize",
        EliminateDeadNodes,
        "removes nodes and initializers that no output depends on",
        "after branches and aliases, which leave some; before all that looks for weights, as a dead one is no choice",
    ),
    GraphPass(
        "expand-einsum",
        "canonicalize",
        ExpandEinsum,
        "expands Einsum nodes that do not have two operands",
        "before naming, as it adds nodes",
    ),
    GraphPass(
        "expand-head-norms",
        "canonicalize",
        ExpandHeadNorms,
        "puts norms on the heads of queries and keys, which a fused attention node holds, in front of it",
        "before naming, as it adds nodes",
    ),
    GraphPass(
        "name-nodes",
        "canonicalize",
        NameNodes,
        "gives every node a name of its own",
        "after the last pass that adds nodes: plans and reports refer to nodes by name",
    ),
    GraphPass(
        "declare-cache-widths",
        "canonicalize",
        DeclareCacheWidths,
        "declares the width of KV caches as static, where fused attention knows it and the file has a name for it",
        "after branches and functions, which may hold the attention",
    ),
    GraphPass(
        "fork-rotary-tables",
        "canonicalize",
        ForkRotaryTables,
        "lets each layer, and each head, select columns of its own of a shared rotary table",
        "after naming, as it names its nodes after the uses; before forking constants, as stored tables stay shared",
    ),
    FORK_SHARED_CONSTANTS,
)


def canonicalize(model: ir.Model, observer: PassObserver | None = None) -> ir.Model:
    """Bring ``model`` (this object, in place) into the canonical form and return it."""
    return run_passes(model, CANONICALIZATION_PASSES, observer).model
