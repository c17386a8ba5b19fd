"""Closed forms of a model: weights rotated or refitted for a plan, so that slicing loses as little as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph, trace_graph
from snpc.passes.weights import (
    ConsumerWeight,
    GroupWeights,
    WeightEdits,
    WeightSlice,
    apply_edits,
    closed_form_kinds,
    refusal_reasons,
)
from snpc.planning import SlicePlan
from snpc.runtime.batches import unpacked_size
from snpc.runtime.closed_form.algebra import (
    LowRankBasis,
    refit_decoder,
    refit_rows,
    relative_ridge,
    shared_value_loss,
    solve_low_rank_qk,
    solve_low_rank_vo,
    solve_shared_qk,
    solving,
    statistic_variances,
    unit_columns,
)
from snpc.runtime.closed_form.elimination import (
    EliminationOrder,
    LeastSquaresSystem,
    eliminate,
    eliminate_by_score_loss,
    with_factors,
)
from snpc.runtime.closed_form.normalizations_inside import before_gain, fit_normalizations_inside, score_systems
from snpc.runtime.closed_form.ridge import choose_refit_ridge, refit_regression
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    SILENT,
    Execution,
    Progress,
    SpillableStore,
    memory_budget,
    track,
)
from snpc.runtime.statistics import (
    ConsumerMoments,
    GroupMoments,
    LazyMoments,
    MomentSet,
    StatisticKey,
    Statistics,
    check_statistics_match,
    required_statistics,
)
from snpc.types import AnyArray, ClosedFormKind, FloatArray, Group, IntArray

WEIGHT_BYTES = 256 << 20  # of fitted weights that stay in memory

ROTATED: tuple[ClosedFormKind, ...] = ("low_rank_qk", "low_rank_vo")
"""The kinds that change the basis of a group, so that it keeps its first units."""


@dataclass(frozen=True)
class ClosedForms:
    """Closed forms of a model for one calibration set, by group id.

    ``kinds``: groups that have one. ``bases`` (per block): of those that are rotated. ``elimination_orders`` (per
    block): of those whose units are selected. ``skipped``: why a group has none.
    """

    analysis: Analysis
    kinds: Mapping[str, ClosedFormKind]
    moments: Mapping[str, GroupMoments] = field(repr=False)
    bases: Mapping[str, tuple[LowRankBasis, ...]] = field(repr=False)
    elimination_orders: Mapping[str, tuple[EliminationOrder, ...]] = field(repr=False)
    skipped: Mapping[str, str]
    samples: int
    source: str = ""
    """The calibration data, in words."""

    @classmethod
    def empty(cls, analysis: Analysis) -> ClosedForms:
        return cls(analysis, {}, {}, {}, {}, {}, 0)

    def without_factors(self) -> ClosedForms:
        """The same without the factors that give trials their weights."""
        bare = {
            group_id: tuple(replace(order, factors=()) for order in orders)
            for group_id, orders in self.elimination_orders.items()
        }
        return replace(self, elimination_orders=bare)

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells these closed forms, and what they were fitted to, from others: their losses."""
        losses = {group.id: self.loss_curve(group) for group in self.analysis.groups}
        return self.analysis.identity, self.kinds, losses, self.samples, self.source

    def loss_curve(self, group: Group) -> FloatArray | None:
        """[size + 1]: squared output error on the calibration data by how many units per block are kept; None where
        the group has no closed form."""
        if group.id in self.bases:
            total: FloatArray = np.sum([basis.loss for basis in self.bases[group.id]], axis=0)
            return total
        if group.id in self.elimination_orders:
            return np.asarray(np.sum([order.loss for order in self.elimination_orders[group.id]], axis=0))
        return None


# -- solving ---------------------------------------------------------------------------------------------------------


def moments_from_statistics(analysis: Analysis, statistics: Statistics, groups: Sequence[Group]) -> MomentSet:
    """The moments that the closed forms of these groups take. Raises UserError where they were not measured."""
    check_statistics_match(statistics, analysis)
    kinds = closed_form_kinds(analysis.weights, groups)
    for group in groups:
        missing = missing_statistics(analysis, statistics, group)
        if missing:
            raise UserError(
                f"the statistics of {statistics.model} hold nothing of {group.id} ({', '.join(missing)}): measure "
                "again with the same --roles, --include and --exclude, and without --criterion"
            )
    moments, skipped = LazyMoments(kinds, statistics.sums, statistics.odd), refusal_reasons(analysis.weights, groups)
    return MomentSet(kinds, moments, skipped, statistics.samples, statistics.describe_sources())


def missing_statistics(analysis: Analysis, statistics: Statistics, group: Group) -> list[str]:
    """What the group's closed form takes and was not measured of it, or not in its shape."""
    sums = statistics.sums.get(group.id, {})
    return [
        str(key)
        for key in required_statistics(analysis.weights[group.id])
        if str(key) not in sums or not has_expected_shape(group, key, sums[str(key)])
    ]


def has_expected_shape(group: Group, key: StatisticKey, sums: FloatArray) -> bool:
    """Has the statistic the shape that this group gives?"""
    if key.kind == "gram_joint":  # any number of columns per unit, and the column of ones
        size = unpacked_size(len(sums)) if sums.ndim == 1 else None
        return size is not None and size % group.size == 1 % group.size
    if key.kind == "gram_per_repeat":
        return sums.shape[1:] == (group.blocks, group.size + 1, group.size + 1)
    return sums.shape in ((group.blocks, group.size, group.size), (group.blocks, group.size + 1))


def solve_closed_forms(
    analysis: Analysis,
    statistics: Statistics,
    groups: Sequence[Group],
    store: SpillableStore | None = None,
    progress: Progress = SILENT,
) -> ClosedForms:
    """Solve the closed forms of these groups for every width.

    ``store``: where the factors are kept that give trials their weights; None: none are. Raises UserError where
    ``statistics`` are of another model, or not of these groups.
    """
    moment_set = moments_from_statistics(analysis, statistics, groups)
    orders: dict[str, tuple[EliminationOrder, ...]] = {}
    bases: dict[str, tuple[LowRankBasis, ...]] = {}
    for group in track(progress, "order", groups, len(groups)):
        kind = moment_set.kinds.get(group.id)
        if kind is None:
            continue
        with solving(group.id):  # nothing of one group is held while the next is solved
            if kind in ROTATED:
                weights = analysis.weights[group.id]
                bases[group.id] = low_rank_bases(analysis.traced_graph, weights, moment_set.moments[group.id])
            else:
                orders[group.id] = elimination_orders(analysis, group, moment_set.moments[group.id], store)
    release_moments(moment_set.moments)
    return ClosedForms(
        analysis,
        moment_set.kinds,
        moment_set.moments,
        bases,
        orders,
        moment_set.skipped,
        moment_set.samples,
        moment_set.source,
    )


def elimination_orders(
    analysis: Analysis, group: Group, moments: GroupMoments, store: SpillableStore | None
) -> tuple[EliminationOrder, ...]:
    """One per block. Those of consumers that are refitted have factors in ``store``, where there is one."""
    if analysis.weights[group.id].kind == "score_selection":
        (losses,) = moments.score_losses
        return tuple(eliminate_by_score_loss(of_block) for of_block in losses)
    if analysis.weights[group.id].kind == "score_refit":
        return tuple(
            eliminate(score_systems(analysis, group, moments, block), group.size) for block in range(group.blocks)
        )
    systems = least_squares_systems(analysis, group, moments)
    order = eliminate(systems, group.size)
    if store is not None:
        order = with_factors(order, systems)
        order = replace(order, factors=tuple(factor.stored(store.keep) for factor in order.factors))
    return (order,)


def least_squares_systems(analysis: Analysis, group: Group, moments: GroupMoments) -> list[LeastSquaresSystem]:
    """One per consumer weight, and one per normalization inside the layer."""
    systems = [
        LeastSquaresSystem(
            inputs.moment,
            consumer.matrix(analysis.traced_graph),
            relative_ridge(len(inputs.moment), inputs.count),
            inputs.means,
        )
        for consumer, inputs in zip(analysis.weights[group.id].consumers, moments.consumers[0], strict=True)
    ]
    normalizations = analysis.weights[group.id].normalizations
    if not normalizations:
        return systems
    energy = sum(float(np.sum(system.weight * (system.moment @ system.weight))) for system in systems)
    for norm, outputs in zip(normalizations, moments.normalized, strict=True):
        variances = statistic_variances(before_gain(analysis, norm, outputs), norm.positions)
        systems.append(LeastSquaresSystem(np.diag(variances), np.full((group.size, 1), np.sqrt(energy))))
    return systems


def low_rank_bases(
    source: TracedGraph, weights: GroupWeights, moments: GroupMoments, edits: WeightEdits | None = None
) -> tuple[LowRankBasis, ...]:
    """One per block; ``edits``: what was changed in the weights before."""
    if moments.scores is None:
        (consumer,) = weights.consumers
        return tuple(
            value_basis(contexts, consumer.rows(source, block, edits))
            for block, contexts in enumerate(moments.consumers)
        )
    scores = moments.scores
    size = scores.query.shape[1]
    ridges = (relative_ridge(size, scores.query_count), relative_ridge(size, scores.key_count))
    solve = solve_shared_qk if weights.projects_both_alike else solve_low_rank_qk
    return tuple(solve(query, key, ridges) for query, key in zip(scores.query, scores.key, strict=True))


def value_basis(contexts: Sequence[ConsumerMoments], rows: FloatArray) -> LowRankBasis:
    """The basis of values that one query head reads, or several; ``rows`` [repeats, d, D]: their output projections."""
    ridge = relative_ridge(rows.shape[1], sum(context.count for context in contexts))
    moments = [context.moment for context in contexts]
    basis = solve_low_rank_vo(np.sum(moments, axis=0), np.concatenate(list(rows), axis=1), ridge)
    if len(contexts) == 1:
        return basis
    return replace(basis, loss=shared_value_loss(moments, list(rows), basis.encode, ridge))


# -- the weights of a plan -------------------------------------------------------------------------------------------


def in_rotated_order(closed_forms: ClosedForms, plan: SlicePlan) -> SlicePlan:
    """The plan with rotated groups keeping their first units: the rotation sorts units by importance."""
    keep = dict(plan.keep)
    for group_id in closed_forms.bases:
        if group_id in keep:
            keep[group_id] = tuple(tuple(range(len(row))) for row in keep[group_id])
    return replace(plan, keep=keep)


def fit_parallel(closed_forms: ClosedForms, plan: SlicePlan, execution: Execution = DEFAULT_EXECUTION) -> TracedGraph:
    """The model at full size, every weight fitted for the plan on the activations of the dense model. Fitted weights
    beyond ``execution.memory_limit`` lie in temporary files."""
    source, store = closed_forms.analysis.traced_graph, weight_store(execution)
    edits = closed_form_edits(closed_forms, plan, store=store)
    return trace_graph(apply_edits(source, edits), source.dim_sizes, kv_cache=source.kv_cache)


def weight_store(execution: Execution) -> SpillableStore:
    """Where fitted weights lie: they are read once or twice."""
    return SpillableStore(min(memory_budget(execution.memory_limit) // 4, WEIGHT_BYTES))


def closed_form_edits(
    closed_forms: ClosedForms,
    plan: SlicePlan,
    earlier: Mapping[str, AnyArray] | None = None,
    store: SpillableStore | None = None,
) -> WeightEdits:
    """Every edit of the plan; ``earlier``: contents of the constants that were changed before. ``store``: where weights
    lie; None: in memory.

    Units of linear layers are rotated first, the last layer first: what is refitted in front of them, and added to a
    bias there, is in their new basis. Consumers of whole heads come next: the basis of the values is solved for what is
    left of them.
    """
    edits = WeightEdits({name: [start_from(array)] for name, array in (earlier or {}).items()})
    if store is not None:
        edits.keep = store.keep
    analysis = closed_forms.analysis
    position = {node: index for index, node in enumerate(analysis.traced_graph.model.graph)}

    def turn(group: Group) -> tuple[int, int]:
        if closed_forms.kinds[group.id] == "low_rank_vo" and group.role != "vo":
            return 0, -max(position[node] for node in analysis.weights[group.id].consumers[0].nodes)
        return (1, 0) if group.role == "head" else (2, 0)

    groups = [g for g in analysis.groups if g.id in plan.keep and g.id in closed_forms.kinds]
    for group in sorted(groups, key=turn):
        rows, kind = plan.keep[group.id], closed_forms.kinds[group.id]
        with solving(group.id):
            if kind == "refit":
                refit_consumers(edits, closed_forms, group, np.array(rows[0], np.int64))
            if kind in ("refit", "score_refit"):
                fit_normalizations_inside(edits, analysis, group, closed_forms.moments[group.id], rows)
            elif kind in ROTATED:
                apply_basis(edits, closed_forms, group, len(rows[0]))
    if store is not None:
        release_moments(closed_forms.moments)
    return edits


def release_moments(moments: Mapping[str, GroupMoments]) -> None:
    """Forget those that were computed when they were read."""
    if isinstance(moments, LazyMoments):
        moments.release()


def start_from(contents: AnyArray) -> Callable[[FloatArray], FloatArray]:
    """The change of a constant to what it was changed to before."""
    return lambda _: contents.astype(np.float64)


def refit_consumers(edits: WeightEdits, closed_forms: ClosedForms, group: Group, keep: IntArray) -> None:
    """Refit every consumer weight; what the removed units contribute on average is added to the bias behind it.

    A factor in the order of the units gives the weights of a trial; without one they are solved for, with a ridge that
    is chosen for this width.
    """
    analysis = closed_forms.analysis
    (order,) = closed_forms.elimination_orders.get(group.id, (None,))
    refits = order.refit_for(keep) if order is not None else None
    for number, consumer in enumerate(analysis.weights[group.id].consumers):
        weight, columns = consumer.matrix(analysis.traced_graph, edits), unit_columns(keep, consumer.columns)
        if order is not None and refits is not None:
            fitted, means = refits[number], order.factors[number].means
        else:
            moments = closed_forms.moments[group.id].consumers[0][number]
            fitted, means = refit_kept_rows(moments, weight, columns), moments.means
        consumer.put(edits, keep, fitted)
        weight[columns] -= fitted
        compensate_means(edits, consumer, means, weight)


def refit_kept_rows(moments: ConsumerMoments, weight: FloatArray, columns: IntArray) -> FloatArray:
    """[kept, D]: rows for these columns that best replace ``weight``, with the ridge that carries over from one half of
    the samples to the other; by a rule where there are no halves."""
    odd = moments.odd_moment()
    if odd is None:
        return refit_rows(moments.moment, weight, columns, relative_ridge(len(moments.moment), moments.count))
    choice = choose_refit_ridge(moments.moment, odd, weight, columns)
    del odd
    fitted = refit_regression(moments.moment, weight, columns).solve(choice.ridge, overwrite=True)
    fitted += weight[columns]
    return fitted


def compensate_means(
    edits: WeightEdits, consumer: ConsumerWeight, means: Sequence[FloatArray], lost: FloatArray
) -> None:
    """Add the mean output of the ``lost`` [columns, D] part of a consumer weight to the bias behind each use."""
    for node, mean in zip(consumer.nodes, means, strict=True):
        edits.add_bias(str(node.name), mean @ lost)


def apply_basis(edits: WeightEdits, closed_forms: ClosedForms, group: Group, width: int | None = None) -> None:
    """Rotate the group so that its first ``width`` units (default: all) carry most."""
    source, weights = closed_forms.analysis.traced_graph, closed_forms.analysis.weights[group.id]
    width = group.size if width is None else width
    bases = closed_forms.bases[group.id]
    if weights.kind == "low_rank_qk":
        for side, slices in enumerate(weights.operands):
            for weight_slice in slices:
                for block, basis in enumerate(bases):
                    edits.mix(weight_slice, block, basis.encode if side == 0 else basis.decode.T)
        return
    (consumer,), moments = weights.consumers, closed_forms.moments[group.id]
    if consumer.weight_slice.tensor in edits.changes:
        bases = low_rank_bases(source, weights, moments, edits)
    for weight_slice in weights.producers:
        for block, basis in enumerate(bases):
            edits.mix(weight_slice, block, basis.encode)
    refit_output_projection(edits, source, consumer, moments, [basis.encode[:, :width] for basis in bases])


def refit_output_projection(
    edits: WeightEdits,
    source: TracedGraph,
    consumer: ConsumerWeight,
    moments: GroupMoments,
    encoders: Sequence[FloatArray],
) -> None:
    """Refit the rows of the output projection, head by head, to values in the bases ``encoders``; what the context
    loses on average is added to the bias."""
    for block, (encode, contexts) in enumerate(zip(encoders, moments.consumers, strict=True)):
        ridge = relative_ridge(len(encode), sum(context.count for context in contexts))
        projections = consumer.rows(source, block, edits)
        for index, context, projection in zip(consumer.weight_slice.index, contexts, projections, strict=True):
            fitted = refit_decoder(context.moment, encode, projection, ridge)
            write_rows(edits, consumer, index[block], fitted)
            compensate_means(edits, consumer, context.means, projection - encode @ fitted)


def write_rows(edits: WeightEdits, consumer: ConsumerWeight, positions: IntArray, rows: FloatArray) -> None:
    """Write ``rows`` at the first of these positions; the others become zero."""
    padded = np.zeros((len(positions), rows.shape[1]))
    padded[: len(rows)] = rows
    target = WeightSlice(consumer.weight_slice.tensor, consumer.weight_slice.axis, (positions[None],))
    edits.put(target, 0, np.arange(len(positions)), padded)
