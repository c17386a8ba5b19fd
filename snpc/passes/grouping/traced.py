"""A graph with its labels and units: the result of label propagation that all later stages read."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph import DimSizes, ShapeFacts, infer_graph
from snpc.passes.grouping.interleaved_heads import find_units
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import Trace, propagate_labels


@dataclass(frozen=True)
class TracedGraph:
    """A canonical model at ``dim_sizes``, with its shapes, labels and units. ``kv_cache``: KV caches are labeled
    too."""

    model: ir.Model
    dim_sizes: DimSizes
    facts: ShapeFacts
    trace: Trace
    units: Units
    kv_cache: bool = False


def trace_graph(
    model: ir.Model, dim_sizes: DimSizes, facts: ShapeFacts | None = None, kv_cache: bool = False
) -> TracedGraph:
    """Propagate labels through ``model`` and resolve them to units.

    ``dim_sizes``: sizes of the dynamic dimensions. ``kv_cache``: KV cache inputs and outputs may be narrowed too.
    """
    facts = facts or infer_graph(model, dim_sizes)
    trace = propagate_labels(model, facts, kv_cache)
    return TracedGraph(model, dim_sizes, facts, trace, find_units(trace), kv_cache)
