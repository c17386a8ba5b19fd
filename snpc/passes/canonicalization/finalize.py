"""The last clean-up before a model is written."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.passes.canonicalization.shared_constants import merge_forks


def finalize(model: ir.Model) -> ir.Model:
    """What is written: no dead nodes, no stale shapes of intermediate values, copies that ended equal merged again."""
    common.RemoveUnusedNodesPass()(model)
    merge_forks(model.graph)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
                value.type = None
    return model
