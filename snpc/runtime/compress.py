"""Closed-form compression: measure second moments once, read loss curves off them, and refit weights to a plan.

Groups whose freedom is ``basis`` are rotated before they are cut; of groups that are selected, what reads them is
refitted. Where a group's weights do not have the form that this needs, its units are selected by a criterion and left
as they are; ``Compression.skipped`` says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.closed import Elimination, Rebase, eliminate, rebase_scores, rebase_values, refit
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.edit import Edits, NoPlace, edited, operand_places, reader_of, value_places
from snpc.passes.plan import Choice, Method, Plan, Scores, chosen_groups, make_plan
from snpc.passes.rewrite import Traced, traced
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.measure import measure, wanted_statistics
from snpc.runtime.score import score
from snpc.types import FloatArray, Group, IntArray

Progress = Callable[[Iterable[Feeds]], Iterable[Feeds]]
NEEDS: Mapping[str, tuple[str, ...]] = {
    "scores": ("moment:query", "centred:key"),
    "values": ("moment:context", "sums:context"),
    "refit": ("moment:hidden", "sums:hidden"),
}


@dataclass(frozen=True)
class Moments:
    """Second moments of a group's activations: ``first``/``second`` [blocks, d, d] and the mean [blocks, d]."""

    first: FloatArray
    second: FloatArray | None = None
    mean: FloatArray | None = None


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

    def curve(self, group: Group) -> FloatArray | None:
        """[size + 1]: squared output error on the calibration data when so many units per block are kept."""
        if group.id in self.rebases:
            total: FloatArray = np.sum([r.loss for r in self.rebases[group.id]], axis=0)
            return total
        found = self.eliminations.get(group.id)
        return None if found is None else found.loss


def form_of(analysis: Analysis, group: Group) -> str:
    """Which closed form fits the group. Raises NoPlace with the reason where none does."""
    if group.role == "qk" and group.freedom == "basis":
        for side in (0, 1):
            operand_places(analysis.traced, group, side)
        return "scores"
    if group.role == "vo" and group.freedom == "basis":
        value_places(analysis.traced, group)
        reader_of(analysis.traced, group)
        return "values"
    if group.role in ("ffn", "conv", "other") and group.blocks == 1:
        if len(reader_of(analysis.traced, group).place.index) != 1:
            raise NoPlace("its reader sees every unit several times")
        return "refit"
    raise NoPlace(group.freedom_reason or f"no closed form for {group.role}")


def compress(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    *,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Compression:
    """Measure what the closed forms of these groups need, and solve them for every width."""
    forms: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for group in groups:
        try:
            forms[group.id] = form_of(analysis, group)
        except NoPlace as reason:
            skipped[group.id] = str(reason)
    wanted = wanted_statistics(analysis, {name: NEEDS[form] for name, form in forms.items()})
    complete = {name for name, form in forms.items() if sum(w.group.id == name for w in wanted) == len(NEEDS[form])}
    for name in set(forms) - complete:
        skipped[name] = "its activations cannot be watched"
        del forms[name]
    wanted = [w for w in wanted if w.group.id in complete]
    sums: dict[str, FloatArray] = {}
    samples = 0
    batches: Iterable[Feeds] = calibration.batches()
    if wanted:
        for result in measure(analysis, wanted, progress(batches) if progress else batches, provider=provider):
            for name, array in result.items():
                sums[name] = sums[name] + array if name in sums else array
        samples = calibration.samples
    found: dict[str, dict[str, FloatArray]] = defaultdict(dict)
    for item in wanted:
        found[item.group.id][item.kind] = sums[item.output]
    moments = {name: moments_of(forms[name], arrays) for name, arrays in found.items()}
    rebases = {
        g.id: tuple(rebase(analysis, g, forms[g.id], moments[g.id], b) for b in range(g.blocks))
        for g in groups
        if forms.get(g.id) in ("scores", "values")
    }
    eliminations = {
        g.id: eliminate(moments[g.id].first[0], reader_of(analysis.traced, g).rows(analysis.traced, 0)[0])
        for g in groups
        if forms.get(g.id) == "refit"
    }
    return Compression(analysis, forms, moments, rebases, eliminations, skipped, samples)


def moments_of(form: str, arrays: Mapping[str, FloatArray]) -> Moments:
    if form == "scores":
        return Moments(arrays["moment"], arrays["centred"])
    total, count = arrays["sums"][:, :-1], arrays["sums"][:, -1:]
    mean = total / np.maximum(count, 1.0)
    return Moments(arrays["moment"] - np.einsum("bi,bj->bij", total, mean), None, mean)


def rebase(analysis: Analysis, group: Group, form: str, moments: Moments, block: int) -> Rebase:
    if form == "scores":
        assert moments.second is not None
        return rebase_scores(moments.first[block], moments.second[block])
    rows = reader_of(analysis.traced, group).rows(analysis.traced, block)
    return rebase_values(moments.first[block], np.concatenate(list(rows), axis=1))


def with_curves(scores: Scores, compression: Compression) -> Scores:
    """Scores whose ranking across groups, and whose order within refitted groups, follow the closed forms' losses."""
    curves = {g.id: c for g in scores.analysis.groups if (c := compression.curve(g)) is not None}
    values: dict[str, FloatArray] = dict(scores.values)
    for name, found in compression.eliminations.items():
        ranks = np.empty(len(found.order))
        ranks[found.order] = np.arange(len(found.order))
        values[name] = ranks[None, :]
    for name, parts in compression.rebases.items():
        size = len(parts[0].loss) - 1
        values[name] = np.tile(np.arange(size, 0, -1, dtype=np.float64), (len(parts), 1))
    return replace(
        scores, values=values, curves=curves, method="auto", samples=max(scores.samples, compression.samples)
    )


@dataclass(frozen=True)
class Decision:
    """A plan, and the closed forms that it is to be fitted with (None: slice the weights as they are)."""

    plan: Plan
    compression: Compression | None = None


def decide(
    analysis: Analysis,
    choice: Choice,
    *,
    calibration: Calibration | None = None,
    method: Method | None = None,
    criterion: str | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Decision:
    """Score and plan in one step.

    ``method`` "auto" needs calibration data and uses closed forms, with ``criterion`` (default "auto") for the groups
    that have none; "select" scores by ``criterion`` only (default "auto" with data, "magnitude" without). Left out, it
    is "auto" where there is data and no criterion was named. Raises UserError where data is needed and missing.
    """
    groups = chosen_groups(analysis, choice)
    method = method or ("auto" if calibration is not None and criterion is None else "select")
    if method == "auto" and calibration is None:
        raise UserError("--method auto refits weights from calibration data: give --calib, or --method select")
    judge = criterion or ("auto" if calibration is not None else "magnitude")
    if method == "select" or calibration is None:
        scores = score(analysis, judge, calibration, roles=choice.roles, provider=provider, progress=progress)
        return Decision(make_plan(scores, choice))
    found = compress(analysis, calibration, groups, provider=provider, progress=progress)
    skip = set(found.forms)
    rest = score(analysis, judge, calibration, roles=choice.roles, skip=skip, provider=provider, progress=progress)
    plan = make_plan(with_curves(rest, found), choice)
    return Decision(plan, found)


def compression_for(plan: Plan, calibration: Calibration | None, *, provider: str = "cpu") -> Compression | None:
    """The closed forms that a plan read from a file is to be fitted with; None where it slices weights as they are.

    Raises UserError where they are needed and there is no data.
    """
    if plan.method == "select":
        return None
    if calibration is None:
        raise UserError("this plan refits weights (method auto): give --calib, the data that it was made with")
    groups = [g for g in plan.analysis.groups if g.id in plan.keep]
    return compress(plan.analysis, calibration, groups, provider=provider)


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
    return traced(edited(source, edits), source.sizes)


def fit_reader(edits: Edits, compression: Compression, group: Group, keep: IntArray) -> None:
    source = compression.analysis.traced
    moments, reader = compression.moments[group.id], reader_of(source, group)
    weight = reader.rows(source, 0)[0]
    fitted = refit(moments.first[0], weight, keep)
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
