"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.passes.slicing.slice import Cuts
from snpc.passes.weights.edits import WeightEdits
from snpc.planning.allocate import allocate_widths
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan, UnitScores, cuts_of, top_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.algebra import elimination_widths
from snpc.runtime.closed_form.fit import ClosedForms, closed_form_edits
from snpc.runtime.closed_form.masked_weights import changed_constants, edited_constants, trial_weights
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import SpillableStore, memory_budget
from snpc.runtime.sensitivity.curve_fit import OutputChange, fit_curves
from snpc.runtime.sensitivity.segmented_model import SegmentedModel, SegmentStates, open_segmented_model
from snpc.runtime.statistics.padding import PaddingMasks, TokenMask, TokenMasks, find_padding, token_mask_runner
from snpc.types import AnyArray, Feeds, FloatArray, Group, Role

SHARE_GRID = (
    0.92,
    0.83,
    0.75,
    0.58,
    0.5,
    0.42,
    0.25,
)  # kept of a group's units where it is seen how much the outputs move
CURVE_SHARES = (0.92, 0.75, 0.5, 0.25)  # those of them that tell of every width
FIRST_SHARES = (0.75, 0.42)  # one for each group of a role, in turn, from which a first plan is made
MIN_GROUPS_PER_ROLE = 8  # groups of a role, from which on they tell enough about each other for that
REFINEMENT_ROUNDS = 2  # plans that are made on the way to the final one
SAMPLES_PER_WIDTH = 4  # per width
SAMPLE_POOLS = 2  # that many times other samples, in turn


def measure_loss_curves(
    compression: ClosedForms,
    scores: UnitScores,
    calibration: Calibration,
    groups: Sequence[Group],
    choice: Budget | None = None,
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones, from where the group
    lies on; in between, the closed-form loss gives the shape (``curve_fit``). With a ``choice`` that is near what it
    comes to: once for each group (four times where they are few, or much is to go), then twice at the widths of the
    plan that these curves make, where these are new. A group's measurements see different samples in turn, so that a
    line through them averages over more of them.

    ``scores`` say which units go first. Padded tokens of an output [batch, tokens, ..] do not count. Outputs of the
    dense model lie in memory up to ``execution.memory_limit`` bytes, the others in temporary files.
    Raises UserError where the target of ``choice`` is out of reach.
    """
    analysis = compression.analysis
    few = choice is not None and keeps_most_units(groups, scores, choice)
    first = list(initial_widths(compression, groups)) if few else [(g, nearest_widths(g, CURVE_SHARES)) for g in groups]
    touched = {
        g.id: changed_constants(
            analysis.traced_graph, *trial_edits(compression, scores, g, widths[0] if widths else g.size)
        )
        for g, widths in first
    }
    padding = find_padding(analysis.traced_graph, [(spec.name, leading_axes) for spec in analysis.model.outputs])
    with (
        token_mask_runner(analysis.traced_graph, padding, execution) as masks,
        open_segmented_model(analysis, touched, execution) as chain,
    ):
        shelf = SpillableStore(memory_budget(execution.memory_limit))
        pools = [
            [
                TrialBatch(chain.dense_states(feeds, shelf), output_token_masks(masks(feeds), padding))
                for feeds in batches
            ]
            for batches in sample_pools(calibration)
        ]
        probing = CurveMeasurement(compression, scores, chain, pools, groups)
        probing.measure(first)
        for _ in range(REFINEMENT_ROUNDS if choice is not None else 0):
            assert choice is not None
            planned = allocate_widths(groups, replace(scores, curves=probing.curves()), choice)
            probing.measure((g, nearest_widths(g, [planned[g.id] / g.size])) for g in groups)
        return probing.curves()


def keeps_most_units(groups: Sequence[Group], scores: UnitScores, choice: Budget) -> bool:
    """Would groups keep half of their units or more, were all cut alike? Further down, a plan that is made from trials
    near itself may be one that no trial further off has put right."""
    if choice.max_drift is not None:
        return False
    alike = allocate_widths(groups, scores, replace(choice, uniform=True))
    return float(np.mean([alike[g.id] / g.size for g in groups])) >= 0.5


def initial_widths(compression: ClosedForms, groups: Sequence[Group]) -> Iterator[tuple[Group, list[int]]]:
    """``FIRST_SHARES`` in turn for the groups of a role; ``CURVE_SHARES`` where they are few, or no closed form gives
    the shape."""
    counts = Counter(group.role for group in groups)
    turns: dict[Role, Iterator[float]] = defaultdict(lambda: itertools.cycle(FIRST_SHARES))
    for group in groups:
        known = counts[group.role] >= MIN_GROUPS_PER_ROLE and compression.loss_curve(group) is not None
        yield group, nearest_widths(group, [next(turns[group.role])] if known else CURVE_SHARES)


class CurveMeasurement:
    """Trials of widths so far, and the curves through them."""

    def __init__(
        self,
        compression: ClosedForms,
        scores: UnitScores,
        chain: SegmentedModel,
        pools: Sequence[Sequence[TrialBatch]],
        groups: Sequence[Group],
    ) -> None:
        self.compression, self.scores, self.chain, self.pools = compression, scores, chain, pools
        self.shapes = {g.id: prior_curve(compression, g) for g in groups}
        self.turns = {g.id: turn for turn, g in enumerate(groups)}
        self.changes: dict[tuple[str, int], OutputChange] = {}

    def measure(self, wanted: Iterable[tuple[Group, Sequence[int]]]) -> None:
        """Try these widths, but for those that have been."""
        for group, widths in wanted:
            for width in widths:
                if (group.id, width) not in self.changes:
                    self.changes[group.id, width] = self.measure_width(group, width)

    def measure_width(self, group: Group, width: int) -> OutputChange:
        number = self.turns[group.id] % len(self.pools)
        self.turns[group.id] += 1
        arrays = trial_constants(self.compression, self.scores, group, width)
        gaps = [one.change(self.chain.outputs_with(one.states, group.id, arrays)) for one in self.pools[number]]
        return OutputChange(group, width, number, float(np.mean(gaps)))

    def curves(self) -> dict[str, FloatArray]:
        return fit_curves(self.shapes, list(self.changes.values()))


def leading_axes(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of an output [batch, tokens, ..]."""
    return (shape[0], shape[1]) if len(shape) > 2 else (0, 0)


def output_token_masks(masks: TokenMasks, padding: PaddingMasks) -> dict[str, TokenMask]:
    """Output -> bool [batch, tokens]: does the token count?"""
    return {name: masks[told.name] for name, told in padding.row_masks.items() if told.order == "plain"}


@dataclass(frozen=True)
class TrialBatch:
    """One batch that weights are tried on: what the dense model makes of it, and which tokens of its outputs count."""

    states: SegmentStates
    counts: Mapping[str, TokenMask]

    def change(self, moved: Mapping[str, AnyArray]) -> float:
        return mean_relative_change(self.states[-1], moved, self.counts)


def sample_pools(calibration: Calibration) -> list[list[Feeds]]:
    """``SAMPLE_POOLS`` times ``SAMPLES_PER_WIDTH``, from the first batches."""
    count = -(-SAMPLES_PER_WIDTH // calibration.batch)
    batches: list[Feeds] = list(itertools.islice(calibration.first_rows(SAMPLES_PER_WIDTH), count * SAMPLE_POOLS))
    return [batches[k : k + count] for k in range(0, len(batches), count)]


def measurable_widths(group: Group) -> list[int]:
    """Every width that may be tried: the elimination of the group's units knows what is left of its reader there."""
    return nearest_widths(group, SHARE_GRID)


def nearest_widths(group: Group, shares: Sequence[float]) -> list[int]:
    """The nearest of ``measurable_widths`` to these shares of a group's units."""
    known = elimination_widths(group.size)[:-1]
    grid = sorted({min(known, key=lambda width: abs(width - group.size * share)) for share in SHARE_GRID if known})
    return sorted({min(grid, key=lambda width: abs(width - group.size * share)) for share in shares if grid})


def prior_curve(compression: ClosedForms, group: Group) -> FloatArray:
    """The closed-form loss, or where there is none a parabola: changes that add up evenly."""
    curve = compression.loss_curve(group)
    return curve if curve is not None else np.linspace(1.0, 0.0, group.size + 1) ** 2


def mean_relative_change(
    dense: Mapping[str, AnyArray], moved: Mapping[str, AnyArray], counts: Mapping[str, TokenMask] | None = None
) -> float:
    """Mean over outputs of |moved - dense|^2 / |dense|^2; ``counts``: the tokens that count, by output."""
    counts = counts or {}
    each = [relative_change(dense[k], a, counts.get(k)) for k, a in moved.items() if a.dtype.kind not in "biuO"]
    return float(np.mean(each)) if each else 0.0


def relative_change(dense: AnyArray, moved: AnyArray, counts: TokenMask | None = None) -> float:
    """|moved - dense|^2 / |dense|^2, in float64, over the tokens that count."""
    dense, moved = np.atleast_1d(dense), np.atleast_1d(moved)
    gap = size = 0.0
    for k in range(len(dense)):  # sample by sample, since logits over a vocabulary are big
        a, b = (np.asarray(array[k] if counts is None else array[k][counts[k]], np.float64) for array in (dense, moved))
        gap += float(np.sum((a - b) ** 2))
        size += float(np.sum(a**2))
    return gap / max(size, 1e-300)


def trial_edits(compression: ClosedForms, scores: UnitScores, group: Group, width: int) -> tuple[WeightEdits, Cuts]:
    """What cutting this group to ``width`` does to constants, in closed form if it has one."""
    plan = SlicePlan(compression.analysis, "", {}, {group.id: top_units(scores.values[group.id], width)}, "auto")
    edits = closed_form_edits(compression, plan) if group.id in compression.kinds else WeightEdits()
    return edits, cuts_of(plan)


def trial_constants(compression: ClosedForms, scores: UnitScores, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width``, and what was cut silent."""
    source = compression.analysis.traced_graph
    edits, cuts = trial_edits(compression, scores, group, width)
    return trial_weights(source, edited_constants(source, edits), cuts)
