"""Which whole sublayers go: chosen by what the outputs change when they are gone, never by a similarity alone.

Sublayers are taken one after the other, the next one by the change of the outputs with all that went before gone too.
Then swaps: one comes back and another goes in its place, while that lowers the change (EvoPress, arXiv 2410.14649,
shows that the order of single removals alone misleads). At last those come back without which the budget is met too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from snpc.errors import UserError
from snpc.passes import Analysis, cost_without, remove_sublayers
from snpc.planning import Budget
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.sensitivity.layer_trials import LayerTrials, layer_trial_batches, measure_means, open_layer_trials
from snpc.types import Cost, FloatArray, Sublayer

TRIED_AGAIN = 8  # of the sublayers that are left, those whose removal promised least change are tried at each step
MAX_SWAPS = 16


def remove_layers(
    analysis: Analysis, budget: Budget, calibration: Calibration | None, execution: Execution = DEFAULT_EXECUTION
) -> Analysis:
    """The analysis without the sublayers that the budget takes.

    Raises UserError where there is no data to choose them on, and where the budget cannot be met by them.
    """
    check_layer_budget(analysis, budget, calibration)
    assert calibration is not None
    sublayers = removable_sublayers(analysis, budget)
    means = measure_means(analysis, sublayers, calibration, execution)
    batches = layer_trial_batches(analysis, calibration, execution)
    with execution.progress.stage("layer trials", 2 * len(sublayers)) as advance:
        changes: dict[str, float] = {}
        better: dict[str, FloatArray] = {}
        for kind in (means, {}):  # with the means in their place, and with nothing
            with open_layer_trials(analysis, sublayers, kind, batches, execution) as trials:
                for name in trials.names:
                    change = trials.change([name])
                    if kind is means and name in means:
                        better[name] = means[name]
                    elif change <= changes.get(name, change):
                        better.pop(name, None)
                    changes[name] = min(change, changes.get(name, change))
                    advance(1)
    with open_layer_trials(analysis, sublayers, better, batches, execution) as trials:
        search = LayerSearch(analysis, budget, trials, changes)
        with execution.progress.stage("layer search", len(sublayers)) as advance:
            while not search.is_enough(search.gone):
                search.take_next()
                advance(1)
            search.swap()
            search.bring_back()
    return remove_sublayers(analysis, search.gone, {name: better[name] for name in search.gone if name in better})


@dataclass
class LayerSearch:
    """The sublayers that are ``gone`` so far. ``promised``: name -> the change of the outputs that its removal brought
    when it was tried last, beside what had gone before."""

    analysis: Analysis
    budget: Budget
    trials: LayerTrials
    promised: dict[str, float]
    gone: frozenset[str] = frozenset()
    costs: dict[frozenset[str], Cost] = field(default_factory=dict)

    def cost(self, gone: frozenset[str]) -> Cost:
        if gone not in self.costs:
            self.costs[gone] = cost_without(self.analysis, gone)
        return self.costs[gone]

    def is_enough(self, gone: frozenset[str]) -> bool:
        """Does the budget need no more than these?"""
        if self.budget.ratio is not None:
            return len(gone) >= round(self.budget.ratio * len(self.trials.names))
        return self.share_left(gone) <= target_share(self.budget)

    def share_left(self, gone: frozenset[str]) -> float:
        """Of the dense model's MACs, parameters or bytes."""
        kind = target_kind(self.budget)
        return float(getattr(self.cost(gone), kind) / getattr(self.analysis.cost, kind))

    def price(self, name: str, change: float) -> float:
        """The change of the outputs per MAC or parameter that is saved, or by itself for a ratio of layers."""
        return max(change, 0.0) / (self.saving(name) if self.budget.ratio is None else 1.0)

    def saving(self, name: str) -> float:
        macs, params = self.analysis.sublayer_graph.savings([name])
        return float(max(macs if target_kind(self.budget) == "macs" else params, 1))

    def left(self) -> list[str]:
        """Those that have not gone, the least promised price first."""
        names = [name for name in self.trials.names if name not in self.gone]
        return sorted(names, key=lambda name: self.price(name, self.promised[name]))

    def take_next(self) -> None:
        """Let one more go: of those that promise least, that which changes least now."""
        before, tried = self.trials.change(self.gone), self.left()[:TRIED_AGAIN]
        if not tried:
            raise UserError(unreachable(self.budget, self.share_left(self.gone)))
        for name in tried:
            self.promised[name] = self.trials.change(self.gone | {name}) - before
        self.gone |= {min(tried, key=lambda name: self.price(name, self.promised[name]))}

    def swap(self) -> None:
        """Exchange those without which the outputs change much less for others, while that lowers the change."""
        for _ in range(MAX_SWAPS):
            best, least = self.gone, self.trials.change(self.gone)
            for name in sorted(self.gone, key=lambda name: self.trials.change(self.gone - {name}))[:2]:
                for other in self.left()[: TRIED_AGAIN // 2]:
                    exchanged = self.gone - {name} | {other}
                    change = self.trials.change(exchanged)
                    if change < least and self.is_enough(exchanged):
                        best, least = exchanged, change
            if best == self.gone:
                return
            self.gone = best

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
    if analysis.reduction is not None:
        raise UserError("the role layer and --tokens do not go together: leave out one of them")
    if budget.limits_quality or budget.is_latency:
        raise UserError("the role layer needs --ratio R, or --target macs=R, params=R or bytes=R")
    if budget.ratio is None and set(budget.roles) != {"layer"}:
        raise UserError(
            "a target for whole layers and widths together is not supported: give --ratio, or prune twice, first with "
            "--roles layer, then the result with the other roles"
        )
    unused = {"--uniform": budget.uniform, "--allocator dimap": budget.allocator == "dimap"}
    for flag, given in unused.items():
        if given and set(budget.roles) == {"layer"}:
            raise UserError(f"{flag} is for widths: leave it out with --roles layer")


def target_kind(budget: Budget) -> str:
    return budget.target.kind if budget.target is not None else "macs"


def target_share(budget: Budget) -> float:
    return budget.target.share if budget.target is not None else 1.0


def unreachable(budget: Budget, least: float) -> str:
    left = f"{target_kind(budget)}={least:.3f}"
    return f"target {budget.target} cannot be reached: with all layers gone that can go, {left} is left"
