"""Joint search over the widths of a plan: moves of units between groups, tried with all groups cut at once.

Loss curves are of one group at a time, and their sum says little of a plan that cuts half of a model: what one group
loses, the next has to live with. So the plan that they give is where a search starts. In each round every group is
made one step narrower and one step wider, on few samples; a step saves the same in every group. A move widens the
groups whose step gains most and narrows as many whose step costs least, and the best of several moves on more samples
is taken if it beats the plan there (successive halving, as in EvoPress, arXiv 2410.14649, which draws its moves at
random).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snpc.planning import (
    Budget,
    UnitScores,
    allocate_widths,
    allowed_widths,
    required_savings,
    savings_by_width,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.sensitivity.plan_trials import PlanTrials, TrialWeights, Widths, open_plan_trials
from snpc.types import FloatArray, Group

MOVE_ROUNDS = 6
STEP_BATCHES = 1  # on which single steps are tried
MOVE_BATCHES = 2  # on which all moves are tried
FINAL_BATCHES = 8  # on which the best moves are compared with the plan
FINALISTS = 2
PAIRS_PER_MOVE = (1, 2, 4, 8, 16)  # pairs of groups, one of which gets narrower and one wider
FIRST_STEP = 1 / 200  # of the model: what a step saves; half of it after a round that found nothing better
LAST_STEP = 1 / 800


def search_widths(
    closed_forms: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    groups: Sequence[Group],
    budget: Budget,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, int]:
    """Group id -> units per block to keep, for a target in MACs, parameters or bytes: those of ``allocate_widths``, or
    others that save as much and change the outputs less.

    Trial weights are refitted to the dense model, as those of loss curves are. Nothing is drawn at random: the same
    data gives the same widths. Raises UserError where the target is out of reach.
    """
    limit = ResourceLimit.of(groups, scores, budget)
    start = allocate_widths(groups, scores, budget)
    store = SpillableStore(memory_budget(execution.memory_limit) // 2)
    weights = TrialWeights(closed_forms, scores, groups, store)
    with (
        execution.progress.stage("search", MOVE_ROUNDS) as advance,
        open_plan_trials(weights, calibration, execution) as trials,
    ):
        trials.widths, step = start, FIRST_STEP
        for _ in range(MOVE_ROUNDS):
            if step >= LAST_STEP and not improve(trials, limit, step):
                step /= 2
            weights.forget(but=trials.widths)
            advance(1)
        return dict(trials.widths)


def improve(trials: PlanTrials, limit: ResourceLimit, step: float) -> bool:
    """One round: take the best move, if it beats the plan so far."""
    moves = propose_moves(trials, limit, step)
    batches = trials.take(MOVE_BATCHES)
    finalists = sorted(moves, key=lambda move: trials.change(move, batches))[:FINALISTS]
    batches = trials.take(FINAL_BATCHES)
    changes = [trials.change(move, batches) for move in finalists]
    if not changes or min(changes) >= trials.change(trials.widths, batches):
        return False
    trials.widths = finalists[changes.index(min(changes))]
    return True


def propose_moves(trials: PlanTrials, limit: ResourceLimit, step: float) -> list[Widths]:
    """Moves of 1, 2, 4 .. pairs of groups, as long as widening one gains more than narrowing the other costs."""
    batches, widths = trials.take(STEP_BATCHES), trials.widths
    now = trials.change(widths, batches)

    def costs(side: int) -> dict[str, tuple[float, int]]:
        """Group id -> (change per saving, width) of one step; those of wider groups gain where the sign is minus."""
        found = {}
        for group_id, width in limit.steps(widths, side * step).items():
            change = trials.change({**widths, group_id: width}, batches) - now
            found[group_id] = (
                change / abs(limit.saving(group_id, width) - limit.saving(group_id, widths[group_id])),
                width,
            )
        return found

    narrower, wider = costs(-1), costs(1)
    pairs = list(pair_groups(narrower, wider))
    moves: list[Widths] = []
    for count in (c for c in PAIRS_PER_MOVE if c <= len(pairs)):
        chosen = pairs[:count]
        moved = dict(widths)
        moved |= {a: narrower[a][1] for a, _ in chosen} | {b: wider[b][1] for _, b in chosen}
        touched = {group_id for pair in chosen for group_id in pair}
        rest = [group_id for group_id in sorted(narrower, key=narrower.__getitem__) if group_id not in touched]
        move = limit.meet(moved, [*(a for a, _ in chosen), *rest])
        if move is not None and move not in moves:
            moves.append(move)
    return moves


def pair_groups(
    narrower: Mapping[str, tuple[float, int]], wider: Mapping[str, tuple[float, int]]
) -> list[tuple[str, str]]:
    """(group to narrow, group to widen), the best pair first; each group is in one pair at most."""
    givers, takers = sorted(narrower, key=narrower.__getitem__), sorted(wider, key=wider.__getitem__)
    pairs: list[tuple[str, str]] = []
    used: set[str] = set()
    while True:
        giver = next((group_id for group_id in givers if group_id not in used), None)
        taker = next((group_id for group_id in takers if group_id not in used | {giver}), None)
        if giver is None or taker is None or narrower[giver][0] + wider[taker][0] >= 0:
            return pairs
        pairs.append((giver, taker))
        used |= {giver, taker}


@dataclass(frozen=True)
class ResourceLimit:
    """``savings``: group id -> [size + 1], MACs, parameters or bytes that are saved, by units per block that are kept;
    ``required`` of them, of ``whole`` of the model. ``options``: the widths that the budget allows, ascending."""

    groups: tuple[Group, ...]
    savings: Mapping[str, FloatArray]
    options: Mapping[str, list[int]]
    required: float
    whole: float

    @classmethod
    def of(cls, groups: Sequence[Group], scores: UnitScores, budget: Budget) -> ResourceLimit:
        assert budget.target is not None
        savings = {group.id: savings_by_width(scores, group, budget.target) for group in groups}
        options = {group.id: sorted(allowed_widths(group, budget)) for group in groups}
        most = sum(float(savings[name][widths[0]]) for name, widths in options.items())
        required, _, _ = required_savings(scores, budget.target, most)
        whole = float(getattr(scores.analysis.cost, budget.target.kind))
        return cls(tuple(groups), savings, options, required * (1 - 1e-12), whole)

    def saving(self, group_id: str, width: int) -> float:
        return float(self.savings[group_id][width])

    def total(self, widths: Widths) -> float:
        return sum(self.saving(group_id, width) for group_id, width in widths.items())

    def steps(self, widths: Widths, share: float) -> dict[str, int]:
        """Group id -> the allowed width that is nearest to ``share`` of the model wider (if negative: narrower), of the
        groups that have another one on that side."""
        found = {}
        for group in self.groups:
            now = widths[group.id]
            aim = now + share * self.whole / max(self.saving(group.id, 0) / group.size, 1e-300)
            beside = [width for width in self.options[group.id] if (width - now) * share > 0]
            if beside and self.saving(group.id, 0) > 0:
                found[group.id] = min(beside, key=lambda width: (abs(width - aim), width))
        return found

    def meet(self, widths: Widths, order: Sequence[str]) -> Widths | None:
        """``widths`` narrowed, in turn and by as little as is allowed, until they save what is required. None where
        they cannot."""
        met, left = dict(widths), list(order)
        while self.total(met) < self.required:
            left = [group_id for group_id in left if met[group_id] > self.options[group_id][0]]
            if not left:
                return None
            for group_id in left:
                met[group_id] = max(width for width in self.options[group_id] if width < met[group_id])
                if self.total(met) >= self.required:
                    break
        return met
