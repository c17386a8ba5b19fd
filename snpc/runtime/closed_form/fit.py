"""Weights made for a plan: rotated, or refitted, so that cutting to the plan loses least."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.grouping.traced import TracedGraph, trace_graph
from snpc.passes.weights.attention_operands import operand_weights, value_weights
from snpc.passes.weights.closed_form_kinds import closed_form_kinds
from snpc.passes.weights.consumers import ConsumerWeight, consumer_weights, single_consumer_weight
from snpc.passes.weights.edits import WeightEdits, WeightSlice, apply_edits
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.algebra import (
    EliminationOrder,
    LeastSquaresSystem,
    LowRankBasis,
    eliminate,
    eliminate_by_score_loss,
    refit_decoder,
    refit_rows,
    relative_ridge,
    shared_value_loss,
    solve_low_rank_qk,
    solve_low_rank_vo,
    unit_columns,
)
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.statistics.moments import ConsumerMoments, GroupMoments, LazyMoments, MomentSet, required_statistics
from snpc.runtime.statistics.packed_symmetric import unpacked_size
from snpc.runtime.statistics.statistics import Statistics, check_statistics_match
from snpc.types import FloatArray, Group, IntArray


@dataclass(frozen=True)
class ClosedForms:
    """Closed forms of a model for one calibration set. ``forms``: group id -> "scores" or "values" (rotated), "refit"
    (what reads it) or "coupled" (selected by what the scores lose)."""

    analysis: Analysis
    kinds: Mapping[str, str]
    moments: Mapping[str, GroupMoments] = field(repr=False)
    bases: Mapping[str, tuple[LowRankBasis, ...]] = field(repr=False)
    elimination_orders: Mapping[str, tuple[EliminationOrder, ...]] = field(repr=False)
    skipped: Mapping[str, str]
    samples: int
    source: str = ""
    """What it was measured on, in words."""

    @classmethod
    def empty(cls, analysis: Analysis) -> ClosedForms:
        return cls(analysis, {}, {}, {}, {}, {}, 0)

    def without_refits(self) -> ClosedForms:
        """The same, without the weights that were noted for trials."""
        bare = {
            name: tuple(replace(one, refits={}) for one in found) for name, found in self.elimination_orders.items()
        }
        return replace(self, elimination_orders=bare)

    def loss_curve(self, group: Group) -> FloatArray | None:
        """[size + 1]: squared output error on the calibration data when so many units per block are kept."""
        if group.id in self.bases:
            total: FloatArray = np.sum([r.loss for r in self.bases[group.id]], axis=0)
            return total
        if group.id in self.elimination_orders:
            return np.asarray(np.sum([e.loss for e in self.elimination_orders[group.id]], axis=0))
        return None


def moments_from_statistics(analysis: Analysis, statistics: Statistics, groups: Sequence[Group]) -> MomentSet:
    """What the closed forms of these groups need, from what was measured. Raises UserError where that is not in it."""
    check_statistics_match(statistics, analysis)
    forms, skipped = closed_form_kinds(analysis, groups)
    for group in groups:
        found = statistics.sums.get(group.id, {})
        needed = required_statistics(analysis, group, forms[group.id]) if group.id in forms else ()
        missing = [name for name in needed if name not in found or not has_expected_shape(group, name, found[name])]
        if missing:
            raise UserError(
                f"the statistics of {statistics.model} hold nothing of {group.id} ({', '.join(missing)}): measure "
                "again with the same --roles, --include and --exclude, and without --criterion"
            )
    moments = LazyMoments(forms, statistics.sums)
    return MomentSet(analysis, forms, moments, skipped, statistics.samples, statistics.describe_sources())


def has_expected_shape(group: Group, name: str, sums: FloatArray) -> bool:
    kind = name.partition(":")[0]
    if kind == "joint":  # units of any number of columns, and ones
        size = unpacked_size(len(sums)) if sums.ndim == 1 else None
        return size is not None and size % group.size == 1 % group.size
    if kind == "apart":
        return sums.shape[1:] == (group.blocks, group.size + 1, group.size + 1)
    return sums.shape in ((group.blocks, group.size, group.size), (group.blocks, group.size + 1))


def solve_closed_forms(
    analysis: Analysis,
    statistics: Statistics,
    groups: Sequence[Group],
    fits_at: Mapping[str, Collection[int]] | None = None,
    shelf: SpillableStore | None = None,
) -> ClosedForms:
    """Solve the closed forms of these groups for every width.

    ``fits_at``: group id -> widths (of ``closed.steps_of``) for which refitted weights are noted on the way, on
    ``shelf`` if it is given. Raises UserError where ``statistics`` are of another model, or not of these groups.
    """
    measured = moments_from_statistics(analysis, statistics, groups)
    eliminations: dict[str, tuple[EliminationOrder, ...]] = {}
    for group in groups:
        if measured.forms.get(group.id) in ("refit", "coupled"):
            form, widths = measured.forms[group.id], (fits_at or {}).get(group.id, ())
            found = elimination_orders(analysis.traced_graph, group, form, measured.moments[group.id], widths)
            eliminations[group.id] = found if shelf is None else tuple(spill_fits(one, shelf) for one in found)
    return replace(solve_bases(measured, groups), elimination_orders=eliminations)


def elimination_orders(
    source: TracedGraph, group: Group, form: str, moments: GroupMoments, fits_at: Collection[int] = ()
) -> tuple[EliminationOrder, ...]:
    """One per block."""
    if form == "refit":
        return (eliminate(least_squares_systems(source, group, moments), group.size, fits_at=fits_at),)
    assert moments.query_or_loss is not None
    return tuple(eliminate_by_score_loss(losses) for losses in moments.query_or_loss)


def spill_fits(found: EliminationOrder, shelf: SpillableStore) -> EliminationOrder:
    return replace(found, refits={width: tuple(map(shelf.keep, rows)) for width, rows in found.refits.items()})


def least_squares_systems(source: TracedGraph, group: Group, moments: GroupMoments) -> list[LeastSquaresSystem]:
    return [
        LeastSquaresSystem(seen.moment, reader.matrix(source), relative_ridge(len(seen.moment), seen.count))
        for reader, seen in zip(consumer_weights(source, group), moments.consumers[0], strict=True)
    ]


def solve_bases(measured: MomentSet, groups: Sequence[Group]) -> ClosedForms:
    """Only what a given plan needs: no order in which units go."""
    analysis, forms, moments = measured.analysis, measured.forms, measured.moments
    rebases = {
        g.id: low_rank_bases(analysis.traced_graph, g, forms[g.id], moments[g.id])
        for g in groups
        if forms.get(g.id) in ("scores", "values")
    }
    return ClosedForms(analysis, forms, moments, rebases, {}, measured.skipped, measured.samples, measured.source)


def low_rank_bases(
    source: TracedGraph, group: Group, form: str, moments: GroupMoments, edits: WeightEdits | None = None
) -> tuple[LowRankBasis, ...]:
    """One per block."""
    if form == "values":
        reader = single_consumer_weight(source, group)
        return tuple(block_basis(moments.consumers[b], reader.rows(source, b, edits)) for b in range(group.blocks))
    assert moments.query_or_loss is not None and moments.key is not None
    ridges = (relative_ridge(group.size, moments.count), relative_ridge(group.size, moments.second_count))
    return tuple(solve_low_rank_qk(q, k, ridges) for q, k in zip(moments.query_or_loss, moments.key, strict=True))


def block_basis(contexts: Sequence[ConsumerMoments], rows: FloatArray) -> LowRankBasis:
    """Of values that one query head reads, or several; ``rows`` [repeats, d, D]."""
    ridge = relative_ridge(rows.shape[1], sum(c.count for c in contexts))
    found = solve_low_rank_vo(np.sum([c.moment for c in contexts], axis=0), np.concatenate(list(rows), axis=1), ridge)
    if len(contexts) == 1:
        return found
    return replace(found, loss=shared_value_loss([c.moment for c in contexts], list(rows), found.encode, ridge))


def in_rotated_order(compression: ClosedForms, plan: SlicePlan) -> SlicePlan:
    """The plan with rotated groups keeping their first units, which is where the rotation puts what matters most."""
    keep = dict(plan.keep)
    for name in compression.bases:
        if name in keep:
            keep[name] = tuple(tuple(range(len(row))) for row in keep[name])
    return replace(plan, keep=keep)


def fit_parallel(compression: ClosedForms, plan: SlicePlan) -> TracedGraph:
    """The model at its full size with every weight made for the plan: then cutting to the plan loses least."""
    source = compression.analysis.traced_graph
    return trace_graph(
        apply_edits(source, closed_form_edits(compression, plan)), source.dim_sizes, kv_cache=source.kv_cache
    )


def closed_form_edits(compression: ClosedForms, plan: SlicePlan) -> WeightEdits:
    """Every edit that a plan asks for. What reads whole heads is refitted first, since what is left of it decides on
    the basis of the values."""
    edits = WeightEdits()
    groups = [g for g in compression.analysis.groups if g.id in plan.keep and g.id in compression.kinds]
    for group in sorted(groups, key=lambda g: g.role != "head"):
        rows, form = plan.keep[group.id], compression.kinds[group.id]
        if form == "refit":
            refit_consumers(edits, compression, group, np.array(rows[0], np.int64))
        elif form in ("scores", "values"):
            apply_basis(edits, compression, group, form, len(rows[0]))
    return edits


def refit_consumers(edits: WeightEdits, compression: ClosedForms, group: Group, keep: IntArray) -> None:
    """Refit every weight that reads the group; the mean of what goes is added to the bias behind it."""
    source = compression.analysis.traced_graph
    (found,) = compression.elimination_orders.get(group.id, (None,))
    noted = found.refit_for(keep) if found is not None else None
    contexts = compression.moments[group.id].consumers[0]
    for number, (reader, seen) in enumerate(zip(consumer_weights(source, group), contexts, strict=True)):
        weight, columns = reader.matrix(source, edits), unit_columns(keep, reader.columns)
        if noted is not None:
            fitted = noted[number]
        else:
            fitted = refit_rows(seen.moment, weight, columns, relative_ridge(len(seen.moment), seen.count))
        reader.put(edits, keep, fitted)
        gap = weight.copy()
        gap[columns] -= fitted
        compensate_means(edits, reader, seen, gap)


def compensate_means(edits: WeightEdits, reader: ConsumerWeight, seen: ConsumerMoments, gap: FloatArray) -> None:
    for node, mean in zip(reader.nodes, seen.means, strict=True):
        edits.add_bias(str(node.name), mean @ gap)


def apply_basis(
    edits: WeightEdits, compression: ClosedForms, group: Group, form: str, width: int | None = None
) -> None:
    """Turn the group so that its first ``width`` units (default: all) say most."""
    source, width = compression.analysis.traced_graph, group.size if width is None else width
    parts = compression.bases[group.id]
    if form == "scores":
        for side in (0, 1):
            for place in operand_weights(source, group, side):
                for block, part in enumerate(parts):
                    edits.mix(place, block, part.encode if side == 0 else part.decode.T)
        return
    reader, moments = single_consumer_weight(source, group), compression.moments[group.id]
    if reader.place.tensor in edits.changes:
        parts = low_rank_bases(source, group, form, moments, edits)
    for place in value_weights(source, group):
        for block, part in enumerate(parts):
            edits.mix(place, block, part.encode)
    refit_output_projection(edits, source, reader, moments, [part.encode[:, :width] for part in parts])


def refit_output_projection(
    edits: WeightEdits, source: TracedGraph, reader: ConsumerWeight, moments: GroupMoments, makes: Sequence[FloatArray]
) -> None:
    """Rows of the output projection for values in the bases ``makes``, head by head; what the cut takes from the mean
    of the contexts goes into the bias."""
    for block, (make, contexts) in enumerate(zip(makes, moments.consumers, strict=True)):
        ridge = relative_ridge(len(make), sum(c.count for c in contexts))
        weights = reader.rows(source, block, edits)
        for index, seen, weight in zip(reader.place.index, contexts, weights, strict=True):
            fitted = refit_decoder(seen.moment, make, weight, ridge)
            write_rows(edits, reader, index[block], fitted)
            compensate_means(edits, reader, seen, weight - make @ fitted)


def write_rows(edits: WeightEdits, reader: ConsumerWeight, where: IntArray, rows: FloatArray) -> None:
    """Write the first rows of these positions; the others become zero."""
    whole = np.zeros((len(where), rows.shape[1]))
    whole[: len(rows)] = rows
    edits.put(WeightSlice(reader.place.tensor, reader.place.axis, (where[None],)), 0, np.arange(len(where)), whole)
