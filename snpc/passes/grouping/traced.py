"""A graph with its labels and units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, infer_graph
from snpc.passes.grouping.interleaved_heads import find_units
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.propagate import propagate_labels
from snpc.passes.propagation.state import Trace


@dataclass(frozen=True)
class TracedGraph:
    """A canonical model with everything that the trace found in it."""

    model: ir.Model
    dim_sizes: Mapping[str, int]
    facts: ShapeFacts
    trace: Trace
    units: Units
    kv_cache: bool = False


def trace_graph(
    model: ir.Model, sizes: Mapping[str, int], facts: ShapeFacts | None = None, kv_cache: bool = False
) -> TracedGraph:
    """``kv_cache``: caches of keys and values among the inputs and outputs may become narrower too."""
    facts = facts or infer_graph(model, sizes)
    trace = propagate_labels(model, facts, kv_cache)
    return TracedGraph(model, sizes, facts, trace, find_units(trace), kv_cache)
