"""Whole layers and widths in one budget: how many layers go is decided by trials of both together.

Layers are taken one after the other, as for layers alone. After each, the widths of what is left are allocated to the
rest of the budget, and the model is run with the layers switched off and the units gone at once. The layers go with
which the outputs change least; none may be the best. Then layers are exchanged for others while that lowers the change.
At last the sets that are near, and none, are compared with the layers that are kept refitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.planning import Budget, UnitScores, allocate_widths
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.sensitivity.layer_search import (
    REFITTED_SETS,
    LayerCandidates,
    LayerSearch,
    LayerSet,
    best_refitted,
    measure_candidates,
)
from snpc.runtime.sensitivity.layer_trials import open_layer_trials
from snpc.runtime.sensitivity.plan_trials import TrialWeights, Widths
from snpc.types import Group

PATIENCE = 2  # layers that go without a smaller change before the search ends
MAX_EXCHANGES = 4

Layers = frozenset[str]


def remove_layers_beside_widths(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    groups: Sequence[Group],
    budget: Budget,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> Analysis:
    """The analysis without the layers that are to go for a target in MACs, parameters or bytes, the rest of which the
    widths of ``groups`` serve; the analysis itself where none is to go.

    ``scores`` with loss curves, of the model with all its layers. Raises UserError where the target is out of reach.
    """
    found = measure_candidates(closed_forms.analysis, budget, calibration, execution)
    weights = TrialWeights(closed_forms, scores, groups, SpillableStore(memory_budget(execution.memory_limit) // 4))
    refits = scores.method == "auto" and scores.effort != "quick"
    sets: dict[LayerSet, tuple[float, float]] = {}
    for candidates in (found, found.simpler):
        if candidates is None or (sets and not any(layers.maps for layers in sets)):
            continue
        with open_layer_trials(
            found.analysis, found.sublayers, candidates.substitutes, found.batches, execution
        ) as trials:
            search = LayerSearch(candidates, budget, trials, dict(candidates.changes))
            together = LayersAndWidths(candidates, search, weights, scores, groups, execution)
            with execution.progress.stage("layer search", len(found.sublayers)) as advance:
                best = together.exchange(together.fewest_changes())
                advance(len(found.sublayers))
            sets |= together.near(best) if refits else {LayerSet.of(candidates, best): (together.change(best), 0.0)}
    nearest = sorted(sets, key=lambda layers: sets[layers])
    chosen = nearest[0]
    if refits:
        compared = dict.fromkeys([*nearest[:REFITTED_SETS], *(layers for layers in nearest if not layers.names)])
        chosen = best_refitted({layers: sets[layers][1] for layers in compared}, calibration, execution)
    return chosen.removed() if chosen.names else found.analysis


@dataclass
class LayersAndWidths:
    """Trials of layers and widths at once, each set of layers once. ``planned``: the widths beside a set of layers;
    None where the target is out of reach."""

    found: LayerCandidates
    search: LayerSearch
    weights: TrialWeights
    scores: UnitScores
    groups: Sequence[Group]
    execution: Execution
    changes: dict[Layers, float] = field(default_factory=dict)
    planned: dict[Layers, Widths | None] = field(default_factory=dict)

    def fewest_changes(self) -> Layers:
        """The layers, taken one after the other, with which the outputs change least."""
        search, best, idle = self.search, Layers(), 0
        while self.share_left(search.gone) > search.target.share and search.left() and idle < PATIENCE:
            search.take_next()
            if self.change(search.gone) < self.change(best):
                best, idle = search.gone, 0
            elif self.change(best) < math.inf:
                idle += 1
        if self.change(best) == math.inf:
            raise UserError(f"target {search.target} cannot be reached: allow more roles, or narrower groups")
        return best

    def exchange(self, gone: Layers) -> Layers:
        """Take another layer in place of one, while that lowers the change."""
        for _ in range(MAX_EXCHANGES):
            self.search.gone = gone
            exchanged = min(self.search.exchanges(), key=self.promised_change, default=gone)
            if self.change(exchanged) >= self.change(gone):
                break
            gone = exchanged
        return gone

    def near(self, gone: Layers) -> dict[LayerSet, tuple[float, float]]:
        """The set, none, and those with another layer in place of one that promise most -> the change, and how much of
        it the widths beside them add."""
        self.search.gone = gone
        sets = dict.fromkeys([gone, Layers(), *sorted(self.search.exchanges(), key=self.promised_change)])
        changes = {names: self.change(names) for names in list(sets)[:REFITTED_SETS]}
        return {
            LayerSet.of(self.found, names): (change, change - self.search.trials.change(names))
            for names, change in changes.items()
            if change < math.inf
        }

    def change(self, gone: Layers) -> float:
        """Of the outputs, with these layers gone and the widths cut that the budget then takes."""
        if gone not in self.changes:
            widths, found = self.widths(gone), self.found
            self.changes[gone] = math.inf
            if widths is not None:
                arrays = self.weights.arrays(widths)
                layers = [layer for layer in found.sublayers if layer.name in gone]
                with open_layer_trials(
                    found.analysis, layers, found.substitutes, found.batches, self.execution, arrays
                ) as trials:
                    self.changes[gone] = trials.change(gone)
                self.weights.forget(but=widths)
        return self.changes[gone]

    def promised_change(self, gone: Layers) -> float:
        """``change`` without a trial of the widths: what their curves say, by how much more all change together."""
        widths = self.widths(gone)
        if widths is None:
            return math.inf
        return self.search.trials.screen(gone) + self.scale * self.summed_curves(widths)

    @property
    def scale(self) -> float:
        """Of the sum of the curves: as it was found at the layers with the least change so far."""
        best = min(self.changes, key=lambda gone: self.changes[gone])
        widths = self.widths(best)
        assert widths is not None
        by_widths = self.changes[best] - self.search.trials.change(best)
        return max(by_widths, 0.0) / max(self.summed_curves(widths), 1e-12)

    def summed_curves(self, widths: Widths) -> float:
        curves = self.scores.curves
        return sum(float(curves[g.id][widths[g.id]]) for g in self.groups if g.id in curves)

    def widths(self, gone: Layers) -> Widths | None:
        if gone not in self.planned:
            self.planned[gone] = self.allocate(gone)
        return self.planned[gone]

    def allocate(self, gone: Layers) -> Widths | None:
        """The widths that serve the rest of the target. What lies in a layer that is gone keeps its width."""
        constants = self.found.analysis.sublayer_graph.constants(gone)
        left = [g for g in self.groups if not all(site.tensor in constants for site in g.sites)]
        target = self.search.target
        share = target.share + self.share_left(Layers()) - self.share_left(gone)
        budget = replace(self.search.budget, target=replace(target, share=min(share, 1.0)))
        try:
            return {g.id: g.size for g in self.groups} | allocate_widths(left, self.scores, budget)
        except UserError:
            return None

    def share_left(self, gone: Layers) -> float:
        """Of the dense model's MACs, parameters or bytes, without these layers: rows that nobody reads then count."""
        cost = self.found.analysis.cost
        macs, params = self.found.savings(gone)
        if self.search.target.kind == "macs":
            return 1 - (self.found.analysis.dead_macs + macs) / cost.macs
        return 1 - params / cost.params
