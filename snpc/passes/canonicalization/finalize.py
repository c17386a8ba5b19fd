"""The last clean-up before a model is written: no dead nodes, forked constants merged, no stale shapes."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import GraphPass, PassObserver, run_passes
from snpc.passes.canonicalization.eliminate_dead_nodes import EliminateDeadNodes
from snpc.passes.canonicalization.rotary_tables import SimplifyColumnSelections
from snpc.passes.canonicalization.shared_constants import MergeForkedConstants, ShareRotaryTables


class DropStaleShapes(ir.passes.InPlacePass):
    """Forget the types and shapes of values between nodes: after a cut those in the file no longer hold."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output():
                    modified = modified or value.shape is not None or value.type is not None
                    value.shape = None
                    value.type = None
        return ir.passes.PassResult(model, modified)


FINALIZATION_PASSES = (
    GraphPass(
        "simplify-column-selections",
        "finalize",
        SimplifyColumnSelections,
        "leaves of the selections of columns of rotary tables those that a cut needs",
        "first: what it leaves unused is removed by the next pass",
    ),
    GraphPass(
        "remove-unused-nodes",
        "finalize",
        EliminateDeadNodes,
        "removes nodes and initializers that no output depends on",
        "before constants are merged: what nothing uses need not be compared",
    ),
    GraphPass(
        "merge-forked-constants",
        "finalize",
        MergeForkedConstants,
        "merges copies of one constant that ended equal",
        "after dead nodes are gone, whose copies would keep a second initializer alive",
    ),
    GraphPass(
        "share-rotary-tables",
        "finalize",
        ShareRotaryTables,
        "writes what layers kept of one rotary table as selections of its columns",
        "after equal copies are merged, which need no selection",
    ),
    GraphPass(
        "drop-stale-shapes",
        "finalize",
        DropStaleShapes,
        "forgets types and shapes of values between nodes",
        "last: nothing behind it reads them, and those of before the cut are wrong",
    ),
)


def finalize(model: ir.Model, observer: PassObserver | None = None) -> ir.Model:
    """``model`` itself, ready to be written."""
    return run_passes(model, FINALIZATION_PASSES, observer).model
