"""model -> analysis: groups, pins, cost. See docs/how-it-works.md for the picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from snpc.passes.groups import drafts, finish
from snpc.passes.resolve import resolve
from snpc.passes.shapes import Facts, best_binding, bindings, evaluate
from snpc.passes.trace import trace_model


def cost_binding(sizes: Mapping[str, int], graph: ir.Graph, fixed: Mapping[str, int]) -> dict[str, int]:
    """Batch 1, sequences of 128, pictures of 224: the sizes at which MACs are quoted."""
    first = {str(d.value or f"{v.name}.0") for v in graph.inputs if v.shape for d in v.shape[:1] if not isinstance(d, int)}
    return {
        name: fixed.get(name, 1 if name in first else 224 if size in (64, 224) else max(size, 128))
        for name, size in sizes.items()
    }
