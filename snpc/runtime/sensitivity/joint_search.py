"""Joint search over the widths of a plan: moves of units between groups, tried with all groups cut at once.

Loss curves are of one group at a time, and their sum says little of a plan that cuts half of a model: what one group
loses, another has to live with. So the plan that they give is where a search starts. In each round every group is made
one step narrower and one step wider, on few samples; a step of every group saves the same. Moves widen the groups whose
step gains most and narrow those whose step costs least, and the best of them on more samples is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.graph import number_components
from snpc.planning import (
    Budget,
    SlicePlan,
    UnitScores,
    allocate_widths,
    allowed_widths,
    cuts_of,
    required_savings,
    savings_by_width,
    top_units,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms, changed_constants, closed_form_edits, edited_constants, trial_weights
from snpc.runtime.evaluation import OutputMetrics
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.sensitivity.loss_curves import TrialBatch, leading_axes, output_token_masks
from snpc.runtime.sensitivity.segmented_model import SegmentedModel, SegmentStates, open_segmented_model
from snpc.runtime.statistics import find_padding, token_mask_runner
from snpc.types import AnyArray, Feeds, FloatArray, Group

SEARCH_ROUNDS = 6
CHUNK = 2  # samples that run together
SEARCH_SAMPLES = 32  # rounds take them in turn
STEP_CHUNKS = 2  # chunks on which single steps are tried, and all moves
MOVE_CHUNKS = 8  # chunks on which the best moves are compared with the plan
BEST_MOVES = 2
MOVE_PAIRS = (1, 2, 4, 8, 16)  # pairs of groups that one move changes
FIRST_STEP = 1 / 200  # of the model, that a step of any group saves
LAST_STEP = 1 / 1600

Widths = dict[str, int]


class TrialWeights:
    """Contents of constants for any widths. Groups that share a constant are solved together. ``keep_only`` forgets."""

    def __init__(self, closed_forms: ClosedForms, scores: UnitScores, groups: Sequence[Group], store: SpillableStore):
        self.closed_forms, self.scores, self.store = closed_forms, scores, store
        self.source = closed_forms.analysis.traced_graph
        narrow = {g.id: self.edits_and_cuts([g], {g.id: max(1, g.size // 2)}) for g in groups}
        self.changed = {g.id: changed_constants(self.source, *narrow[g.id]) for g in groups}
        users: dict[str, list[str]] = {}
        for group_id, names in self.changed.items():
            for name in names:
                users.setdefault(name, []).append(group_id)
        pairs = [pair for sharing in users.values() for pair in itertools.pairwise(sharing)]
        number = number_components([g.id for g in groups], pairs)
        self.clusters = [tuple(g for g in groups if number[g.id] == k) for k in dict.fromkeys(number.values())]
        self.solved: dict[tuple[tuple[str, int], ...], dict[str, AnyArray]] = {}

    def edits_and_cuts(self, groups, widths):
        keep = {g.id: top_units(self.scores.values[g.id], widths[g.id]) for g in groups if widths[g.id] < g.size}
        plan = SlicePlan(self.closed_forms.analysis, "", {}, keep, "auto")
        fitted = {name: rows for name, rows in keep.items() if name in self.closed_forms.kinds}
        return closed_form_edits(self.closed_forms, replace(plan, keep=fitted)), cuts_of(plan)

    def arrays(self, widths: Widths) -> dict[str, AnyArray]:
        found: dict[str, AnyArray] = {}
        for cluster in self.clusters:
            key = tuple((g.id, widths[g.id]) for g in cluster)
            if all(widths[g.id] == g.size for g in cluster):
                continue
            if key not in self.solved:
                edits, cuts = self.edits_and_cuts(cluster, widths)
                arrays = trial_weights(self.source, edited_constants(self.source, edits), cuts)
                self.solved[key] = {name: self.store.keep(a) for name, a in arrays.items()}
            found |= self.solved[key]
        return found


@dataclass
class Chunk:
    batch: TrialBatch
    states: SegmentStates
    widths: Widths


class PlanTrials:
    def __init__(self, model: SegmentedModel, weights: TrialWeights, chunks: list[Chunk], widths: Widths):
        self.model, self.weights, self.chunks, self.widths = model, weights, chunks, widths
        self.passes = 0.0
        self.cost = {}

    def first_segment(self, before: Widths, after: Widths) -> int:
        changed = {g for g in after if before[g] != after[g]}
        clusters = [c for c in self.weights.clusters if any(g.id in changed for g in c)]
        return min((self.model.spans[g.id][0] for c in clusters for g in c), default=len(self.model.segments))

    def update(self, chunk: Chunk) -> None:
        if chunk.widths != self.widths:
            first = self.first_segment(chunk.widths, self.widths)
            chunk.states = self.model.states_from(chunk.states, first, self.weights.arrays(self.widths))
            self.count(first)
            chunk.widths = dict(self.widths)

    def count(self, first):
        self.passes += (len(self.model.segments) - first) / len(self.model.segments) * CHUNK

    def change(self, widths: Widths, numbers) -> FloatArray:
        """[chunks]: change of the outputs."""
        out = []
        for n in numbers:
            chunk = self.chunks[n % len(self.chunks)]
            self.update(chunk)
            first = self.first_segment(self.widths, widths)
            self.count(first)
            outputs = self.model.outputs_from(chunk.states, first, self.weights.arrays(widths))
            out.append(chunk.batch.change(outputs))
        return np.array(out)


def search_widths(
    closed_forms, scores, calibration, groups, budget, *, execution=DEFAULT_EXECUTION, log=print, params=None
):
    p = dict(
        rounds=SEARCH_ROUNDS,
        step_chunks=STEP_CHUNKS,
        move_chunks=MOVE_CHUNKS,
        first=FIRST_STEP,
        last=LAST_STEP,
        samples=SEARCH_SAMPLES,
        best=BEST_MOVES,
        on_round=None,
    ) | (params or {})
    analysis = closed_forms.analysis
    source = analysis.traced_graph
    start = allocate_widths(groups, scores, budget)
    metrics = OutputMetrics.of(analysis)
    padding = find_padding(source, [(spec.name, leading_axes) for spec in analysis.model.outputs])
    store = SpillableStore(memory_budget(execution.memory_limit))
    weights = TrialWeights(closed_forms, scores, groups, store)
    saved = {g.id: savings_by_width(scores, g, budget.target) for g in groups}
    total = sum(float(saved[g.id][0]) for g in groups)
    required = required_savings(scores, budget.target, total)[0]
    options = {g.id: sorted(allowed_widths(g, budget)) for g in groups}
    with (
        token_mask_runner(source, padding, execution) as masks,
        open_segmented_model(analysis, weights.changed, execution) as model,
    ):
        chunks = []
        dense = {g.id: g.size for g in groups}
        for feeds in small_chunks(calibration, CHUNK, p["samples"] // CHUNK):
            states = model.dense_states(feeds, store)
            metrics = metrics.for_values({name: states[-1][name] for name in model.outputs})
            chunks.append(
                Chunk(TrialBatch(states, output_token_masks(masks(feeds), padding), metrics), states, dict(dense))
            )
        trials = PlanTrials(model, weights, chunks, start)
        whole = float(getattr(analysis.cost, budget.target.kind))
        step, turn = p["first"], 0
        for number in range(p["rounds"]):
            at = range(turn, turn + p["step_chunks"])
            turn += p["step_chunks"]
            base = trials.change(trials.widths, at).mean()

            def nearest(g, width):
                return min(options[g.id], key=lambda w: abs(w - width))

            narrower, wider = {}, {}
            for g in groups:
                unit = float(saved[g.id][0]) / g.size
                units = max(1, round(step * whole / unit))
                w = trials.widths[g.id]
                for side, table in ((-1, narrower), (1, wider)):
                    to = nearest(g, w + side * units)
                    if to == w or (side < 0) != (to < w):
                        continue
                    change = trials.change({**trials.widths, g.id: to}, at).mean() - base
                    table[g.id] = (change / abs(float(saved[g.id][to] - saved[g.id][w])), to)
            donors = sorted(narrower, key=lambda n: narrower[n][0])
            receivers = sorted(wider, key=lambda n: wider[n][0])
            moves = []
            for count in MOVE_PAIRS:
                for mult in (1,):
                    new = dict(trials.widths)
                    d = list(donors)
                    r = list(receivers)
                    used = set()
                    done = 0
                    while done < count and d and r:
                        a = next((x for x in d if x not in used), None)
                        b = next((x for x in r if x not in used and x != a), None)
                        if a is None or b is None or -wider[b][0] <= narrower[a][0]:
                            break
                        used |= {a, b}
                        new[a] = narrower[a][1]
                        new[b] = wider[b][1]
                        done += 1
                    if done < count:
                        break
                    fix(
                        new,
                        saved,
                        required,
                        [x for x in donors if x not in used],
                        [x for x in receivers if x not in used],
                        options,
                    )
                    if all(new != m for m in moves):
                        moves.append(new)
            if not moves:
                step /= 2
                log("no moves")
            else:
                first = {k: trials.change(m, at).mean() for k, m in enumerate(moves)}
                best = sorted(first, key=first.get)[: p["best"]]
                more = range(turn, turn + p["move_chunks"])
                turn += p["move_chunks"]
                now = trials.change(trials.widths, more).mean()
                second = {k: trials.change(moves[k], more).mean() for k in best}
                k = min(second, key=second.get)
                log(
                    f"round {number} step {step:.5f} base {base:.5f} first {[round(v, 5) for v in first.values()]} now {now:.5f} second {[round(second[b], 5) for b in best]} best {k} passes {trials.passes:.0f}"
                )
                if second[k] < now:
                    trials.widths = moves[k]
                    if p["on_round"]:
                        p["on_round"](number, trials.widths)
                else:
                    step /= 2
            weights.solved = {k: v for k, v in weights.solved.items() if all(trials.widths[n] == w for n, w in k)}
            if step < p["last"]:
                break
        return trials.widths


def fix(widths, saved, required, donors, receivers, options):
    def total():
        return sum(float(saved[n][w]) for n, w in widths.items())

    k = 0
    while total() < required * (1 - 1e-12) and donors:
        n = donors[k % len(donors)]
        k += 1
        below = [w for w in options[n] if w < widths[n]]
        if below:
            widths[n] = below[-1]
        if k > 1000:
            break
    for n in receivers:
        above = [w for w in options[n] if w > widths[n]]
        while above and total() - float(saved[n][widths[n]] - saved[n][above[0]]) >= required * (1 - 1e-12):
            widths[n] = above.pop(0)


def small_chunks(calibration: Calibration, rows: int, count: int):
    per = max(1, -(-count // len(calibration.batch_sizes())))
    made = []
    for feeds in calibration.first_rows(rows * per):
        n = (
            max(len(a) for k, a in feeds.items() if calibration.has_sample_axis(k))
            if calibration.sample_axes.inputs
            else 1
        )
        for k in range(0, n, rows):
            made.append(
                {name: a[k : k + rows] if calibration.has_sample_axis(name) else a for name, a in feeds.items()}
            )
    return made[:count]
