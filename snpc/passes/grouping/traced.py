"""A graph with its labels and units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from snpc.graph.shapes import Facts, evaluate
from snpc.passes.grouping.interleaved_heads import resolved
from snpc.passes.grouping.units import Units
from snpc.passes.propagation.propagate import Trace, trace_model


@dataclass(frozen=True)
class Traced:
    """A canonical model with everything that the trace found in it."""

    model: ir.Model
    sizes: Mapping[str, int]
    facts: Facts
    trace: Trace
    units: Units
    kv_cache: bool = False


def traced(model: ir.Model, sizes: Mapping[str, int], facts: Facts | None = None, kv_cache: bool = False) -> Traced:
    """``kv_cache``: caches of keys and values among the inputs and outputs may become narrower too."""
    facts = facts or evaluate(model, sizes)
    trace = trace_model(model, facts, kv_cache)
    return Traced(model, sizes, facts, trace, resolved(trace), kv_cache)
