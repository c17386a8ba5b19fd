"""Weights made for a plan: rotated, or refitted, so that cutting to the plan loses least."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.grouping.traced import Traced, traced
from snpc.passes.weights.attention_operands import operand_places, value_places
from snpc.passes.weights.closed_form_kinds import forms_of
from snpc.passes.weights.consumers import Reader, reader_of, readers_of
from snpc.passes.weights.edits import Edits, Place, edited
from snpc.planning.plan import Plan
from snpc.runtime.closed_form.algebra import (
    Elimination,
    Rebase,
    System,
    columns_of,
    eliminate,
    eliminate_coupled,
    read_again,
    rebase_scores,
    rebase_values,
    refit,
    ridge_for,
    shared_values,
)
from snpc.runtime.execution.memory import Shelf
from snpc.runtime.statistics.moments import LazyMoments, Measured, Moments, Seen, needs
from snpc.runtime.statistics.packed_symmetric import packed_size
from snpc.runtime.statistics.statistics import Statistics, check_model
from snpc.types import FloatArray, Group, IntArray


@dataclass(frozen=True)
class Compression:
    """Closed forms of a model for one calibration set. ``forms``: group id -> "scores" or "values" (rotated), "refit"
    (what reads it) or "coupled" (selected by what the scores lose)."""

    analysis: Analysis
    forms: Mapping[str, str]
    moments: Mapping[str, Moments] = field(repr=False)
    rebases: Mapping[str, tuple[Rebase, ...]] = field(repr=False)
    eliminations: Mapping[str, tuple[Elimination, ...]] = field(repr=False)
    skipped: Mapping[str, str]
    samples: int
    source: str = ""
    """What it was measured on, in words."""

    @classmethod
    def empty(cls, analysis: Analysis) -> Compression:
        return cls(analysis, {}, {}, {}, {}, {}, 0)

    def without_fits(self) -> Compression:
        """The same, without the weights that were noted for trials."""
        bare = {name: tuple(replace(one, fits={}) for one in found) for name, found in self.eliminations.items()}
        return replace(self, eliminations=bare)

    def curve(self, group: Group) -> FloatArray | None:
        """[size + 1]: squared output error on the calibration data when so many units per block are kept."""
        if group.id in self.rebases:
            total: FloatArray = np.sum([r.loss for r in self.rebases[group.id]], axis=0)
            return total
        if group.id in self.eliminations:
            return np.asarray(np.sum([e.loss for e in self.eliminations[group.id]], axis=0))
        return None


def measured_moments(analysis: Analysis, statistics: Statistics, groups: Sequence[Group]) -> Measured:
    """What the closed forms of these groups need, from what was measured. Raises UserError where that is not in it."""
    check_model(statistics, analysis)
    forms, skipped = forms_of(analysis, groups)
    for group in groups:
        found = statistics.sums.get(group.id, {})
        needed = needs(analysis, group, forms[group.id]) if group.id in forms else ()
        missing = [name for name in needed if name not in found or not fits(group, name, found[name])]
        if missing:
            raise UserError(
                f"the statistics of {statistics.model} hold nothing of {group.id} ({', '.join(missing)}): measure "
                "again with the same --roles, --include and --exclude, and without --criterion"
            )
    moments = LazyMoments(forms, statistics.sums)
    return Measured(analysis, forms, moments, skipped, statistics.samples, statistics.described())


def fits(group: Group, name: str, sums: FloatArray) -> bool:
    kind = name.partition(":")[0]
    if kind == "joint":  # units of any number of columns, and ones
        size = packed_size(len(sums)) if sums.ndim == 1 else None
        return size is not None and size % group.size == 1 % group.size
    if kind == "apart":
        return sums.shape[1:] == (group.blocks, group.size + 1, group.size + 1)
    return sums.shape in ((group.blocks, group.size, group.size), (group.blocks, group.size + 1))


def compress(
    analysis: Analysis,
    statistics: Statistics,
    groups: Sequence[Group],
    fits_at: Mapping[str, Collection[int]] | None = None,
    shelf: Shelf | None = None,
) -> Compression:
    """Solve the closed forms of these groups for every width.

    ``fits_at``: group id -> widths (of ``closed.steps_of``) for which refitted weights are noted on the way, on
    ``shelf`` if it is given. Raises UserError where ``statistics`` are of another model, or not of these groups.
    """
    measured = measured_moments(analysis, statistics, groups)
    eliminations: dict[str, tuple[Elimination, ...]] = {}
    for group in groups:
        if measured.forms.get(group.id) in ("refit", "coupled"):
            form, widths = measured.forms[group.id], (fits_at or {}).get(group.id, ())
            found = eliminations_of(analysis.traced, group, form, measured.moments[group.id], widths)
            eliminations[group.id] = found if shelf is None else tuple(shelved(one, shelf) for one in found)
    return replace(rotations(measured, groups), eliminations=eliminations)


def eliminations_of(
    source: Traced, group: Group, form: str, moments: Moments, fits_at: Collection[int] = ()
) -> tuple[Elimination, ...]:
    """One per block."""
    if form == "refit":
        return (eliminate(systems_of(source, group, moments), group.size, fits_at=fits_at),)
    assert moments.first is not None
    return tuple(eliminate_coupled(losses) for losses in moments.first)


def shelved(found: Elimination, shelf: Shelf) -> Elimination:
    return replace(found, fits={width: tuple(map(shelf.keep, rows)) for width, rows in found.fits.items()})


def systems_of(source: Traced, group: Group, moments: Moments) -> list[System]:
    return [
        System(seen.moment, reader.matrix(source), ridge_for(len(seen.moment), seen.count))
        for reader, seen in zip(readers_of(source, group), moments.contexts[0], strict=True)
    ]


def rotations(measured: Measured, groups: Sequence[Group]) -> Compression:
    """Only what a given plan needs: no order in which units go."""
    analysis, forms, moments = measured.analysis, measured.forms, measured.moments
    rebases = {
        g.id: rebases_of(analysis.traced, g, forms[g.id], moments[g.id])
        for g in groups
        if forms.get(g.id) in ("scores", "values")
    }
    return Compression(analysis, forms, moments, rebases, {}, measured.skipped, measured.samples, measured.source)


def rebases_of(
    source: Traced, group: Group, form: str, moments: Moments, edits: Edits | None = None
) -> tuple[Rebase, ...]:
    """One per block."""
    if form == "values":
        reader = reader_of(source, group)
        return tuple(rebase_block(moments.contexts[b], reader.rows(source, b, edits)) for b in range(group.blocks))
    assert moments.first is not None and moments.second is not None
    ridges = (ridge_for(group.size, moments.count), ridge_for(group.size, moments.second_count))
    return tuple(rebase_scores(q, k, ridges) for q, k in zip(moments.first, moments.second, strict=True))


def rebase_block(contexts: Sequence[Seen], rows: FloatArray) -> Rebase:
    """Of values that one query head reads, or several; ``rows`` [repeats, d, D]."""
    ridge = ridge_for(rows.shape[1], sum(c.count for c in contexts))
    found = rebase_values(np.sum([c.moment for c in contexts], axis=0), np.concatenate(list(rows), axis=1), ridge)
    if len(contexts) == 1:
        return found
    return replace(found, loss=shared_values([c.moment for c in contexts], list(rows), found.make, ridge))


def settled(compression: Compression, plan: Plan) -> Plan:
    """The plan with rotated groups keeping their first units, which is where the rotation puts what matters most."""
    keep = dict(plan.keep)
    for name in compression.rebases:
        if name in keep:
            keep[name] = tuple(tuple(range(len(row))) for row in keep[name])
    return replace(plan, keep=keep)


def fit(compression: Compression, plan: Plan) -> Traced:
    """The model at its full size with every weight made for the plan: then cutting to the plan loses least."""
    source = compression.analysis.traced
    return traced(edited(source, edits_for(compression, plan)), source.sizes, kv_cache=source.kv_cache)


def edits_for(compression: Compression, plan: Plan) -> Edits:
    """Every edit that a plan asks for. What reads whole heads is refitted first, since what is left of it decides on
    the basis of the values."""
    edits = Edits()
    groups = [g for g in compression.analysis.groups if g.id in plan.keep and g.id in compression.forms]
    for group in sorted(groups, key=lambda g: g.role != "head"):
        rows, form = plan.keep[group.id], compression.forms[group.id]
        if form == "refit":
            fit_readers(edits, compression, group, np.array(rows[0], np.int64))
        elif form in ("scores", "values"):
            fit_basis(edits, compression, group, form, len(rows[0]))
    return edits


def fit_readers(edits: Edits, compression: Compression, group: Group, keep: IntArray) -> None:
    """Refit every weight that reads the group; the mean of what goes is added to the bias behind it."""
    source = compression.analysis.traced
    (found,) = compression.eliminations.get(group.id, (None,))
    noted = found.fit_for(keep) if found is not None else None
    contexts = compression.moments[group.id].contexts[0]
    for number, (reader, seen) in enumerate(zip(readers_of(source, group), contexts, strict=True)):
        weight, columns = reader.matrix(source, edits), columns_of(keep, reader.columns)
        if noted is not None:
            fitted = noted[number]
        else:
            fitted = refit(seen.moment, weight, columns, ridge_for(len(seen.moment), seen.count))
        reader.put(edits, keep, fitted)
        gap = weight.copy()
        gap[columns] -= fitted
        add_means(edits, reader, seen, gap)


def add_means(edits: Edits, reader: Reader, seen: Seen, gap: FloatArray) -> None:
    for node, mean in zip(reader.nodes, seen.means, strict=True):
        edits.add_bias(str(node.name), mean @ gap)


def fit_basis(edits: Edits, compression: Compression, group: Group, form: str, width: int | None = None) -> None:
    """Turn the group so that its first ``width`` units (default: all) say most."""
    source, width = compression.analysis.traced, group.size if width is None else width
    parts = compression.rebases[group.id]
    if form == "scores":
        for side in (0, 1):
            for place in operand_places(source, group, side):
                for block, part in enumerate(parts):
                    edits.mix(place, block, part.make if side == 0 else part.read.T)
        return
    reader, moments = reader_of(source, group), compression.moments[group.id]
    if reader.place.tensor in edits.changes:
        parts = rebases_of(source, group, form, moments, edits)
    for place in value_places(source, group):
        for block, part in enumerate(parts):
            edits.mix(place, block, part.make)
    fit_outputs(edits, source, reader, moments, [part.make[:, :width] for part in parts])


def fit_outputs(edits: Edits, source: Traced, reader: Reader, moments: Moments, makes: Sequence[FloatArray]) -> None:
    """Rows of the output projection for values in the bases ``makes``, head by head; what the cut takes from the mean
    of the contexts goes into the bias."""
    for block, (make, contexts) in enumerate(zip(makes, moments.contexts, strict=True)):
        ridge = ridge_for(len(make), sum(c.count for c in contexts))
        weights = reader.rows(source, block, edits)
        for index, seen, weight in zip(reader.place.index, contexts, weights, strict=True):
            fitted = read_again(seen.moment, make, weight, ridge)
            put_rows(edits, reader, index[block], fitted)
            add_means(edits, reader, seen, weight - make @ fitted)


def put_rows(edits: Edits, reader: Reader, where: IntArray, rows: FloatArray) -> None:
    """Write the first rows of these positions; the others become zero."""
    whole = np.zeros((len(where), rows.shape[1]))
    whole[: len(rows)] = rows
    edits.put(Place(reader.place.tensor, reader.place.axis, (where[None],)), 0, np.arange(len(where)), whole)
