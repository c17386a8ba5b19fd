"""Weights made for a plan: rotated, or refitted, so that cutting to the plan loses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.closed import Elimination, Rebase, eliminate, rebase_scores, rebase_values, refit, ridge_for
from snpc.passes.analyze import Analysis
from snpc.passes.edit import Edits, edited, operand_places, reader_of, value_places
from snpc.passes.plan import Plan
from snpc.passes.rewrite import Traced, traced
from snpc.runtime.moments import Measured, Moments
from snpc.types import FloatArray, Group, IntArray


@dataclass(frozen=True)
class Compression:
    """Closed forms of a model for one calibration set. ``forms``: group id -> "scores", "values" or "refit"."""

    analysis: Analysis
    forms: Mapping[str, str]
    moments: Mapping[str, Moments] = field(repr=False)
    rebases: Mapping[str, tuple[Rebase, ...]] = field(repr=False)
    eliminations: Mapping[str, Elimination] = field(repr=False)
    skipped: Mapping[str, str]
    samples: int

    @classmethod
    def empty(cls, analysis: Analysis) -> Compression:
        return cls(analysis, {}, {}, {}, {}, {}, 0)

    def curve(self, group: Group) -> FloatArray | None:
        """[size + 1]: squared output error on the calibration data when so many units per block are kept."""
        if group.id in self.rebases:
            total: FloatArray = np.sum([r.loss for r in self.rebases[group.id]], axis=0)
            return total
        found = self.eliminations.get(group.id)
        return None if found is None else found.loss


def compress(measured: Measured, groups: Sequence[Group]) -> Compression:
    """Solve the closed forms of these groups for every width."""
    analysis = measured.analysis
    eliminations = {
        g.id: eliminate(
            measured.moments[g.id].first[0],
            reader_of(analysis.traced, g).rows(analysis.traced, 0)[0],
            ridge=ridge_for(g.size, measured.moments[g.id].count),
        )
        for g in groups
        if measured.forms.get(g.id) == "refit"
    }
    return replace(rotations(measured, groups), eliminations=eliminations)


def rotations(measured: Measured, groups: Sequence[Group]) -> Compression:
    """Only what a given plan needs: no order in which units go."""
    analysis, forms, moments = measured.analysis, measured.forms, measured.moments
    rebases = {
        g.id: tuple(rebase(analysis, g, forms[g.id], moments[g.id], b) for b in range(g.blocks))
        for g in groups
        if forms.get(g.id) in ("scores", "values")
    }
    return Compression(analysis, forms, moments, rebases, {}, measured.skipped, measured.samples)


def rebase(analysis: Analysis, group: Group, form: str, moments: Moments, block: int) -> Rebase:
    if form == "scores":
        assert moments.second is not None
        ridges = (ridge_for(group.size, moments.count), ridge_for(group.size, moments.second_count))
        return rebase_scores(moments.first[block], moments.second[block], ridges)
    rows = reader_of(analysis.traced, group).rows(analysis.traced, block)
    return rebase_values(moments.first[block], np.concatenate(list(rows), axis=1), ridge_for(group.size, moments.count))


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
    """Every edit that a plan asks for."""
    edits = Edits()
    for group in compression.analysis.groups:
        rows = plan.keep.get(group.id)
        form = compression.forms.get(group.id)
        if rows is None or form is None:
            continue
        if form == "refit":
            fit_reader(edits, compression, group, np.array(rows[0], np.int64))
        else:
            fit_basis(edits, compression, group, form)
    fit_means(edits, compression, plan)
    return edits


def fit_reader(edits: Edits, compression: Compression, group: Group, keep: IntArray) -> None:
    source = compression.analysis.traced
    moments, reader = compression.moments[group.id], reader_of(source, group)
    weight = reader.rows(source, 0)[0]
    fitted = refit(moments.first[0], weight, keep, ridge_for(group.size, moments.count))
    edits.put(reader.place, 0, keep, fitted)
    assert moments.mean is not None
    edits.add_bias(str(reader.node.name), moments.mean[0] @ weight - moments.mean[0][keep] @ fitted)


def fit_basis(edits: Edits, compression: Compression, group: Group, form: str) -> None:
    source = compression.analysis.traced
    parts = compression.rebases[group.id]
    if form == "scores":
        for side in (0, 1):
            for place in operand_places(source, group, side):
                for block, part in enumerate(parts):
                    edits.mix(place, block, part.make if side == 0 else part.read.T)
        return
    reader = reader_of(source, group)
    for place in value_places(source, group):
        for block, part in enumerate(parts):
            edits.mix(place, block, part.make)
    for block, part in enumerate(parts):
        edits.mix(reader.place, block, part.read.T)


def fit_means(edits: Edits, compression: Compression, plan: Plan) -> None:
    """What the cut takes from the mean of the contexts goes into the output's bias."""
    source = compression.analysis.traced
    for group in compression.analysis.groups:
        rows = plan.keep.get(group.id)
        if rows is None or compression.forms.get(group.id) != "values":
            continue
        moments, reader, width = compression.moments[group.id], reader_of(source, group), len(rows[0])
        assert moments.mean is not None
        lost = np.zeros(reader.width)
        for block, part in enumerate(compression.rebases[group.id]):
            kept = part.make[:, :width] @ part.read[:width]
            weights = reader.rows(source, block)
            lost += sum((moments.mean[block] @ (w - kept @ w) for w in weights), np.zeros(reader.width))
        edits.add_bias(str(reader.node.name), lost)
