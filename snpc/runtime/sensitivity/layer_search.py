"""Which whole sublayers go: chosen by what the outputs change when they are gone, never by a similarity alone.

Sublayers are taken one after the other, the next one by the change of the outputs with all that went before gone too.
Then swaps: one comes back and another goes in its place, while that lowers the change (EvoPress, arXiv 2410.14649,
shows that the order of single removals alone misleads). At last those come back without which the budget is met too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis, cost_without, remove_sublayers
from snpc.passes.sublayers import Substitutes
from snpc.planning import Budget, ResourceTarget, SlicePlan
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms, NotSegmentable, fit_layerwise
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.sensitivity.layer_maps import fit_layer_maps
from snpc.runtime.sensitivity.layer_trials import (
    LayerTrialBatch,
    LayerTrials,
    layer_trial_batches,
    measure_means,
    open_layer_trials,
)
from snpc.types import LAYER_ROLE, Cost, Sublayer

TRIED_AGAIN = 8  # of the sublayers that are left, those whose removal promised least change are tried at each step
FINALISTS = 4  # of these are tried on all samples
MAX_SWAPS = 16
REFITTED_SETS = 6  # of layers, among which the refitted models decide


@dataclass(frozen=True)
class LayerCandidates:
    """Layers that may go. ``substitutes``: what is to stand for some of them. ``changes``: name -> the change of the
    outputs when it alone is gone, on the first samples of ``batches``. ``simpler``: the same where no map stands for a
    layer; None where that is so."""

    analysis: Analysis
    sublayers: Sequence[Sublayer]
    substitutes: Substitutes
    changes: Mapping[str, float]
    batches: Sequence[LayerTrialBatch]
    simpler: LayerCandidates | None = None

    def without(self, gone: Collection[str]) -> Analysis:
        return remove_sublayers(self.analysis, gone, self.standing_for(gone))

    def standing_for(self, gone: Collection[str]) -> Substitutes:
        return {name: self.substitutes[name] for name in gone if name in self.substitutes}

    def savings(self, gone: Collection[str]) -> tuple[int, int]:
        """(MACs, parameters) that go with these layers, less those of the maps that stand for them."""
        graph = self.analysis.sublayer_graph
        macs, params = graph.savings(gone)
        reads = {sublayer.name: sublayer.read for sublayer in self.sublayers}
        shapes = graph.facts.shapes_by_name
        for name, substitute in self.standing_for(gone).items():
            if substitute.map is not None:
                batch, tokens, _ = shapes.get(reads[name], (0, 0, 0))
                macs, params = macs - substitute.map.macs(batch, tokens), params - substitute.map.params
        return macs, params

    def saving(self, name: str, kind: str) -> float:
        """MACs, or parameters for any other kind of target."""
        macs, params = self.savings([name])
        return float(max(macs if kind == "macs" else params, 1))

    def price(self, name: str, kind: str) -> float:
        """The change of the outputs per MAC or parameter that is saved."""
        return max(self.changes[name], 0.0) / self.saving(name, kind)

    def change_refitted(self, gone: Collection[str], calibration: Calibration, execution: Execution) -> float:
        """Change of the outputs with these layers gone and the others refitted. Raises NotSegmentable."""
        if not gone:
            return 0.0
        shorter = self.without(gone)
        plan = SlicePlan(shorter, "none", {}, {}, "auto")
        fitted = fit_layerwise(ClosedForms.empty(shorter), plan, calibration, execution)
        with temporary_session(fitted.model.clone(), execution=execution) as run:
            changes = [b.metrics.change(b.outputs, run(b.feeds), b.token_masks) for b in self.batches]
        return float(np.average(changes, weights=[b.samples for b in self.batches]))


def remove_layers(
    analysis: Analysis,
    budget: Budget,
    calibration: Calibration | None,
    execution: Execution = DEFAULT_EXECUTION,
    *,
    refits: bool = False,
) -> Analysis:
    """The analysis without the sublayers that a budget for them takes. ``refits``: the others will be refitted, so that
    the last choice is between sets after that.

    Raises UserError where there is no data to choose them on, and where the budget cannot be met by them.
    """
    check_layer_budget(analysis, budget, calibration)
    assert calibration is not None
    found = measure_candidates(analysis, budget, calibration, execution)
    sets = search_layers(found, budget, execution)
    if any(layers.maps for layers in sets) and found.simpler is not None:
        sets |= search_layers(found.simpler, budget, execution)
    nearest = sorted(sets, key=lambda layers: sets[layers])
    chosen = nearest[0]
    if refits:
        chosen = best_refitted(dict.fromkeys(nearest[:REFITTED_SETS], 0.0), calibration, execution)
    return chosen.removed()


def search_layers(found: LayerCandidates, budget: Budget, execution: Execution) -> dict[LayerSet, float]:
    """The set that serves the budget and those with one layer exchanged -> the change of the outputs."""
    with open_layer_trials(found.analysis, found.sublayers, found.substitutes, found.batches, execution) as trials:
        search = LayerSearch(found, budget, trials, dict(found.changes))
        with execution.progress.stage("layer search", len(found.sublayers)) as advance:
            while not search.is_enough(search.gone):
                search.take_next()
                advance(1)
            search.swap()
            search.bring_back()
        sets = [search.gone, *filter(search.is_enough, search.exchanges())]
        return {LayerSet.of(found, names): trials.change(names) for names in sets}


@dataclass(frozen=True)
class LayerSet:
    """Layers that go together, of the ``candidates`` that say what stands for each."""

    candidates: LayerCandidates = field(compare=False)
    names: frozenset[str]
    maps: frozenset[str] = frozenset()

    @classmethod
    def of(cls, candidates: LayerCandidates, names: frozenset[str]) -> LayerSet:
        standing = candidates.standing_for(names)
        return cls(candidates, names, frozenset(name for name, s in standing.items() if s.map is not None))

    def removed(self) -> Analysis:
        return self.candidates.without(self.names)


def best_refitted(sets: Mapping[LayerSet, float], calibration: Calibration, execution: Execution) -> LayerSet:
    """Of these sets of layers that with which the outputs change least once the other layers are refitted, and beside
    that by the given amount; the first where that cannot be told. What early layers add can often be made up for."""
    first = next(iter(sets))
    if len(sets) == 1:
        return first
    changes: dict[LayerSet, float] = {}
    with suppress(NotSegmentable):
        for layers, beside in execution.track("refitted without layers", sets.items(), len(sets)):
            changes[layers] = layers.candidates.change_refitted(layers.names, calibration, execution) + beside
    return min(changes, key=lambda layers: changes[layers], default=first)


def measure_candidates(
    analysis: Analysis, budget: Budget, calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> LayerCandidates:
    """Try each layer that may go with nothing in its place, with its mean, and with a map where there is one. A map
    stands where it changes less per MAC or parameter that is saved."""
    sublayers = removable_sublayers(analysis, budget)
    means = measure_means(analysis, sublayers, calibration, execution)
    maps = fit_layer_maps(analysis, sublayers, calibration, execution)
    batches = layer_trial_batches(analysis, calibration, execution)
    changes: list[dict[str, float]] = []
    count = 2 * len(sublayers) + len(maps)
    with execution.progress.stage("layer trials", count) as advance:
        for substitutes in ({}, means, maps):
            tried = [s for s in sublayers if not substitutes or s.name in substitutes]
            with open_layer_trials(analysis, tried, substitutes, batches, execution) as trials:
                changes.append({})
                for name in trials.names:
                    changes[-1][name] = trials.screen([name])
                    advance(1)
    nothing, mean, mapped = changes
    better = {name: means[name] for name, change in mean.items() if change < nothing[name]}
    simpler = LayerCandidates(analysis, sublayers, better, nothing | {name: mean[name] for name in better}, batches)
    alternative = replace(simpler, substitutes=maps, changes=mapped)
    kind = budget.target.kind if budget.target is not None else "macs"
    cheaper = {name for name in maps if alternative.price(name, kind) < simpler.price(name, kind)}
    if not cheaper:
        return simpler
    return replace(
        simpler,
        substitutes={**better, **{name: maps[name] for name in cheaper}},
        changes={**simpler.changes, **{name: mapped[name] for name in cheaper}},
        simpler=simpler,
    )


@dataclass
class LayerSearch:
    """The sublayers that are ``gone`` so far. ``promised``: name -> the change of the outputs that its removal brought
    when it was tried last, beside what had gone before."""

    candidates: LayerCandidates
    budget: Budget
    trials: LayerTrials
    promised: dict[str, float]
    gone: frozenset[str] = frozenset()
    costs: dict[frozenset[str], Cost] = field(default_factory=dict)

    @property
    def analysis(self) -> Analysis:
        return self.candidates.analysis

    @property
    def target(self) -> ResourceTarget:
        """What is to be left; a ratio counts MACs, all of which may stay."""
        return self.budget.target or ResourceTarget("macs", 1.0)

    def cost(self, gone: frozenset[str]) -> Cost:
        if gone not in self.costs:
            self.costs[gone] = cost_without(self.analysis, gone, self.candidates.standing_for(gone))
        return self.costs[gone]

    def is_enough(self, gone: frozenset[str]) -> bool:
        """Does the budget need no more than these?"""
        if self.budget.ratio is not None:
            return len(gone) >= round(self.budget.ratio * len(self.trials.names))
        return self.share_left(gone) <= self.target.share

    def share_left(self, gone: frozenset[str]) -> float:
        """Of the dense model's MACs, parameters or bytes."""
        kind = self.target.kind
        return float(getattr(self.cost(gone), kind) / getattr(self.analysis.cost, kind))

    def price(self, name: str, change: float) -> float:
        """The change of the outputs per MAC or parameter that is saved, or by itself for a ratio of layers."""
        saving = self.candidates.saving(name, self.target.kind) if self.budget.ratio is None else 1.0
        return max(change, 0.0) / saving

    def left(self) -> list[str]:
        """Those that have not gone, the least promised price first."""
        names = [name for name in self.trials.names if name not in self.gone]
        return sorted(names, key=lambda name: self.price(name, self.promised[name]))

    def take_next(self) -> None:
        """Let one more go: of those that promise least, that which changes least now."""
        before, tried = self.trials.screen(self.gone), self.left()[:TRIED_AGAIN]
        if not tried:
            raise UserError(unreachable(self.target, self.share_left(self.gone)))
        for name in tried:
            self.promised[name] = self.trials.screen(self.gone | {name}) - before
        before, finalists = self.trials.change(self.gone), [name for name in self.left() if name in tried][:FINALISTS]
        for name in finalists:
            self.promised[name] = self.trials.change(self.gone | {name}) - before
        self.gone |= {min(finalists, key=lambda name: self.price(name, self.promised[name]))}

    def swap(self) -> None:
        """Exchange those without which the outputs change much less for others, while that lowers the change."""
        for _ in range(MAX_SWAPS):
            best, least = self.gone, self.trials.change(self.gone)
            for exchanged in self.exchanges():
                change = self.trials.change(exchanged)
                if change < least and self.is_enough(exchanged):
                    best, least = exchanged, change
            if best == self.gone:
                return
            self.gone = best

    def exchanges(self) -> list[frozenset[str]]:
        """Sets with another layer in place of one, of those that promise most."""
        back = sorted(self.gone, key=lambda name: self.trials.change(self.gone - {name}))[:2]
        return [self.gone - {name} | {other} for name in back for other in self.left()[: TRIED_AGAIN // 2]]

    def bring_back(self) -> None:
        """Let those stay that the budget can do without, most change first."""
        for name in sorted(self.gone, key=lambda name: self.trials.change(self.gone - {name})):
            if self.is_enough(self.gone - {name}):
                self.gone -= {name}


def removable_sublayers(analysis: Analysis, budget: Budget) -> list[Sublayer]:
    """Those that can go and that the budget's patterns name. Raises UserError where there are none."""
    named = [
        s
        for s in analysis.sublayers
        if (not budget.include or re.search(budget.include, s.name))
        and not (budget.exclude and re.search(budget.exclude, s.name))
    ]
    found = [s for s in named if s.removable]
    if not found:
        why = f", for example {named[0].name}: {named[0].reason}" if named else ""
        raise UserError(
            f"{analysis.model.path.name}: no layer can go whole{why}; `snpc inspect` lists its layers, --roles without "
            "layer cuts widths alone"
        )
    return found


def check_layer_budget(analysis: Analysis, budget: Budget, calibration: Calibration | None) -> None:
    """Raise UserError for a budget that the removal of layers cannot serve."""
    if calibration is None:
        raise UserError(
            "the role layer takes whole layers by what the outputs change without them, which has to be measured: give "
            "--calib"
        )
    if analysis.companions or analysis.model.quantized is not None:
        what = "models that are cut alike" if analysis.companions else "a quantized file that stays quantized"
        raise UserError(f"the role layer is not supported for {what}: leave it out")
    alone = set(budget.roles) == {LAYER_ROLE}
    if alone and (budget.limits_quality or budget.is_latency):
        raise UserError(
            "the role layer alone needs --ratio R, or --target macs=R, params=R or bytes=R; --target latency=R and "
            "limits of quality take roles of widths beside it: --roles all,layer"
        )
    unused = {"--uniform": budget.uniform, "--allocator dimap": budget.allocator == "dimap"}
    for flag, given in unused.items():
        if given and alone:
            raise UserError(f"{flag} is for widths: leave it out with --roles layer")


def unreachable(target: ResourceTarget, least: float) -> str:
    left = f"{target.kind}={least:.3f}"
    return f"target {target} cannot be reached: with all layers gone that can go, {left} is left"
