"""Trials of whole plans: the outputs with all groups cut at once, to the widths that are asked for."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.graph import number_components
from snpc.passes.slicing import Cuts
from snpc.passes.weights import WeightEdits
from snpc.planning import SlicePlan, UnitScores, cuts_of, top_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import ClosedForms, changed_constants, closed_form_edits, edited_constants, trial_weights
from snpc.runtime.evaluation import OutputMetrics
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SpillableStore, memory_budget
from snpc.runtime.sensitivity.loss_curves import TrialBatch, leading_axes, output_token_masks
from snpc.runtime.sensitivity.segmented_model import SegmentedModel, SegmentStates, open_segmented_model
from snpc.runtime.statistics import find_padding, token_mask_runner
from snpc.types import AnyArray, Feeds, Group

Widths = Mapping[str, int]  # group id -> units per block that are kept

BATCH_SAMPLES = 2  # of what is run together
TRIAL_SAMPLES = 64  # that trials take in turn


class TrialWeights:
    """Contents of constants by widths, in closed form where a group has one. Those of groups that share a constant are
    solved together, and all are kept in ``store`` until ``forget``."""

    def __init__(
        self, closed_forms: ClosedForms, scores: UnitScores, groups: Sequence[Group], store: SpillableStore
    ) -> None:
        self.closed_forms, self.scores, self.store = closed_forms, scores, store
        self.source = closed_forms.analysis.traced_graph
        self.changed = {
            g.id: changed_constants(self.source, *self.edits_and_cuts([g], {g.id: max(1, g.size // 2)})) for g in groups
        }
        self.clusters = share_constants(groups, self.changed)
        self.solved: dict[tuple[tuple[str, int], ...], dict[str, AnyArray]] = {}

    def edits_and_cuts(self, groups: Sequence[Group], widths: Widths) -> tuple[WeightEdits, Cuts]:
        keep = {g.id: top_units(self.scores.values[g.id], widths[g.id]) for g in groups if widths[g.id] < g.size}
        plan = SlicePlan(self.closed_forms.analysis, "", {}, keep, "auto")
        fitted = replace(plan, keep={name: rows for name, rows in keep.items() if name in self.closed_forms.kinds})
        return closed_form_edits(self.closed_forms, fitted), cuts_of(plan)

    def arrays(self, widths: Widths) -> dict[str, AnyArray]:
        """The constants that these widths change, by name."""
        found: dict[str, AnyArray] = {}
        for cluster in self.clusters:
            key = tuple((group.id, widths[group.id]) for group in cluster)
            if key not in self.solved:
                self.solved[key] = self.solve(cluster, widths)
            found |= self.solved[key]
        return found

    def solve(self, groups: Sequence[Group], widths: Widths) -> dict[str, AnyArray]:
        if all(widths[group.id] == group.size for group in groups):
            return {}
        edits, cuts = self.edits_and_cuts(groups, widths)
        arrays = trial_weights(self.source, edited_constants(self.source, edits), cuts)
        return {name: self.store.keep(array) for name, array in arrays.items()}

    def forget(self, but: Widths) -> None:
        """Drop what other widths than these have."""
        self.solved = {key: arrays for key, arrays in self.solved.items() if all(but[g] == width for g, width in key)}


def share_constants(groups: Sequence[Group], changed: Mapping[str, frozenset[str]]) -> list[tuple[Group, ...]]:
    """The groups in sets that change no constant of another set."""
    users: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        for name in changed[group.id]:
            users[name].append(group.id)
    pairs = [pair for sharing in users.values() for pair in itertools.pairwise(sharing)]
    number = number_components([group.id for group in groups], pairs)
    return [tuple(g for g in groups if number[g.id] == k) for k in dict.fromkeys(number.values())]


@dataclass
class PlanBatch:
    """A batch, and the values at the segment borders of the model cut to ``widths``."""

    batch: TrialBatch
    states: SegmentStates
    widths: Widths


@dataclass
class PlanTrials:
    """Changes of the outputs by widths. ``widths``: of the plan so far, of which the values at segment borders are kept
    for each batch, so that a trial of others runs from the first group on that differs. ``samples``: how many whole
    samples have been run."""

    model: SegmentedModel
    weights: TrialWeights
    batches: Sequence[PlanBatch]
    widths: Widths
    next_batch: int = 0
    samples: float = field(default=0.0)

    def take(self, count: int) -> list[PlanBatch]:
        """So many batches, which are taken in turn."""
        numbers = range(self.next_batch, self.next_batch + min(count, len(self.batches)))
        self.next_batch += count
        return [self.batches[number % len(self.batches)] for number in numbers]

    def change(self, widths: Widths, batches: Sequence[PlanBatch]) -> float:
        """Mean over the batches of the change of the outputs."""
        arrays, first = self.weights.arrays(widths), self.first_segment(self.widths, widths)
        changes = []
        for batch in batches:
            self.update(batch)
            self.count_run(first)
            changes.append(batch.batch.change(self.model.outputs_from(batch.states, first, arrays)))
        return float(np.mean(changes))

    def update(self, batch: PlanBatch) -> None:
        """Bring the values of a batch to the plan so far."""
        first = self.first_segment(batch.widths, self.widths)
        if first < len(self.model.segments):
            self.count_run(first)
            batch.states = self.model.states_from(batch.states, first, self.weights.arrays(self.widths))
        batch.widths = self.widths

    def first_segment(self, before: Widths, after: Widths) -> int:
        """The first segment in which the two differ; the number of segments where none does."""
        differ = (c for c in self.weights.clusters if any(before[g.id] != after[g.id] for g in c))
        return min((self.model.spans[g.id][0] for cluster in differ for g in cluster), default=len(self.model.segments))

    def count_run(self, first: int) -> None:
        self.samples += BATCH_SAMPLES * (1 - first / len(self.model.segments))


@contextmanager
def open_plan_trials(
    weights: TrialWeights, calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> Iterator[PlanTrials]:
    """Trials of plans on ``TRIAL_SAMPLES`` samples; the plan so far cuts nothing."""
    analysis = weights.closed_forms.analysis
    source, metrics = analysis.traced_graph, OutputMetrics.of(analysis)
    padding = find_padding(source, [(spec.name, leading_axes) for spec in analysis.model.outputs])
    dense = {group.id: group.size for cluster in weights.clusters for group in cluster}
    with (
        token_mask_runner(source, padding, execution) as masks,
        open_segmented_model(analysis, weights.changed, execution) as model,
    ):
        store = SpillableStore(memory_budget(execution.memory_limit) // 2)
        batches = []
        for feeds in small_batches(calibration):
            states = model.dense_states(feeds, store)
            metrics = metrics.for_values({name: states[-1][name] for name in model.outputs})
            judged = TrialBatch(states, output_token_masks(masks(feeds), padding), metrics)
            batches.append(PlanBatch(judged, states, dense))
        yield PlanTrials(model, weights, batches, dense)


def small_batches(
    calibration: Calibration, samples: int = TRIAL_SAMPLES, batch_samples: int = BATCH_SAMPLES
) -> Iterator[Feeds]:
    """So many ``samples``, about as many of each batch, ``batch_samples`` at a time; whole batches where the model
    takes these only."""
    sizes = calibration.batch_sizes()
    per_batch = batch_samples * -(-samples // (batch_samples * len(sizes)))
    left = samples
    for feeds in calibration.first_rows(per_batch):
        sampled = {name: array for name, array in feeds.items() if calibration.has_sample_axis(name)}
        count = max((len(array) for array in sampled.values()), default=1)
        step = batch_samples if count <= per_batch else count
        for start in range(0, count, step):
            if left <= 0:
                return
            left -= step
            yield {**feeds, **{name: array[start : start + step] for name, array in sampled.items()}}
