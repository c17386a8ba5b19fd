"""A plan, and what was fitted for it, carried over to the companions of the model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from snpc.errors import UserError
from snpc.passes import Analysis, Companion
from snpc.passes.companions import transferred_edits
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.slicing import RewrittenModel, rewrite_as_stored
from snpc.passes.weights import UnsupportedWeightForm, apply_edits
from snpc.planning import SlicePlan, cuts_of, pruning_provenance, write_provenance


@dataclass(frozen=True)
class FittedPlan:
    """A plan and the full-size model that is sliced by it, whose weights were fitted to the plan or are the dense
    model's. ``calibration``: the data that they were fitted to, in words; "" without."""

    slices: SlicePlan
    source: TracedGraph
    calibration: str = ""

    @property
    def analysis(self) -> Analysis:
        return self.slices.analysis

    def of_companion(self, companion: Companion) -> FittedPlan:
        """The same units and weights of a companion. Raises UserError where a fitted weight has no place in it."""
        analysis = companion.analysis
        sizes = {group.id: group.size for group in self.analysis.groups}
        keep = {
            match.group.id: match.keep(self.slices.keep[group_id], sizes[group_id])
            for group_id, match in companion.matches.items()
            if group_id in self.slices.keep
        }
        slices = SlicePlan(analysis, self.slices.criterion, self.slices.options, keep, self.slices.method)
        return FittedPlan(slices, self.fitted_companion(companion), self.calibration)

    def fitted_companion(self, companion: Companion) -> TracedGraph:
        traced = companion.analysis.traced_graph
        try:
            edits = transferred_edits(self.analysis.traced_graph.model, self.source.model, companion.alignment)
        except UnsupportedWeightForm as error:
            raise UserError(
                f"{companion.name}: weights that were fitted to {self.analysis.name} cannot be carried over: {error}; "
                "give --method select"
            ) from None
        if not edits.changes and not edits.biases:
            return traced
        return trace_graph(apply_edits(traced, edits), traced.dim_sizes, kv_cache=traced.kv_cache)

    def rewrite(self) -> tuple[RewrittenModel, ir.Model]:
        """See ``rewrite_as_stored``."""
        return rewrite_as_stored(self.analysis.model, self.source, cuts_of(self.slices))

    def sign(self, graph: ir.Model) -> None:
        """Say in ``graph``, which is the result, how it was made."""
        write_provenance(graph, self.analysis.model, pruning_provenance(self.slices, self.calibration))
