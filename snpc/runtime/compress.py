"""Closed-form compression: measure second moments once, read loss curves off them, and refit weights to a plan.

Groups whose freedom is ``basis`` are rotated before they are cut; of groups that are selected, what reads them is
refitted. Where a group's weights do not have the form that this needs, its units are selected by a criterion and left
as they are; ``Compression.skipped`` says why.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.closed import Elimination, Rebase, eliminate, rebase_scores, rebase_values, refit
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.edit import Edits, NoPlace, Place, edited, existing_bias, operand_places, reader_of, value_places
from snpc.passes.mask import removed_positions
from snpc.passes.plan import Choice, Method, Plan, Scores, chosen_groups, cuts_of, make_plan
from snpc.passes.rewrite import Traced, traced
from snpc.passes.slice import dead_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.measure import measure, wanted_statistics
from snpc.runtime.model_io import clean, save
from snpc.runtime.score import score
from snpc.runtime.session import open_session
from snpc.types import AnyArray, FloatArray, Group, IntArray

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
        check_sites(group, [*operand_places(analysis.traced, group, 0), *operand_places(analysis.traced, group, 1)])
        return "scores"
    if group.role == "vo" and group.freedom == "basis":
        check_sites(group, [*value_places(analysis.traced, group), reader_of(analysis.traced, group).place])
        return "values"
    if group.role in ("ffn", "conv", "other") and group.blocks == 1:
        if len(reader_of(analysis.traced, group).place.index) != 1:
            raise NoPlace("its reader sees every unit several times")
        return "refit"
    raise NoPlace(group.freedom_reason or f"no closed form for {group.role}")


def check_sites(group: Group, found: Sequence[Place]) -> None:
    """A change of basis reaches every site of the group, once. Raises NoPlace where it would not."""
    reached = {(site.tensor, site.axis): np.zeros(len(site.units), np.int64) for site in group.sites}
    for place in found:
        for index in place.index:
            np.add.at(reached[place.tensor, place.axis], index.reshape(-1), 1)
    for site in group.sites:
        count = reached[site.tensor, site.axis]
        if (count > 1).any():
            raise NoPlace(f"{site.tensor} makes both sides of it")
        if (count != (site.units >= 0)).any():
            raise NoPlace(f"{site.tensor} acts on it as well")


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


def with_curves(scores: Scores, compression: Compression, curves: Mapping[str, FloatArray]) -> Scores:
    """Scores in which the closed forms set the order of units within their groups, and ``curves`` that of groups."""
    values: dict[str, FloatArray] = dict(scores.values)
    for name, found in compression.eliminations.items():
        ranks = np.empty(len(found.order))
        ranks[found.order] = np.arange(len(found.order))
        values[name] = ranks[None, :]
    for name, parts in compression.rebases.items():
        size = len(parts[0].loss) - 1
        values[name] = np.tile(np.arange(size, 0, -1, dtype=np.float64), (len(parts), 1))
    samples = max(scores.samples, compression.samples)
    return replace(scores, values=values, curves=curves, method="auto", samples=samples)


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

    ``method`` "auto" needs calibration data and uses closed forms, with ``criterion`` (default "mixed") for the groups
    that have none; "select" scores by ``criterion`` only (default "mixed" with data, "magnitude" without). Left out, it
    is "auto" where there is data and no criterion was named. Raises UserError where data is needed and missing.
    """
    groups = chosen_groups(analysis, choice)
    method = method or ("auto" if calibration is not None and criterion is None else "select")
    if method == "auto" and calibration is None:
        raise UserError("--method auto refits weights from calibration data: give --calib, or --method select")
    judge = criterion if criterion is not None else "mixed" if calibration is not None else "magnitude"
    if method == "select" or calibration is None:
        scores = score(analysis, judge, calibration, roles=choice.roles, provider=provider, progress=progress)
        return Decision(make_plan(scores, choice))
    found = compress(analysis, calibration, groups, provider=provider, progress=progress)
    skip = set(found.forms)
    rest = score(analysis, judge, calibration, roles=choice.roles, skip=skip, provider=provider, progress=progress)
    curves = {} if choice.uniform else output_curves(found, calibration, groups, provider=provider)
    plan = make_plan(with_curves(rest, found, curves), choice)
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


# -- how much the outputs mind ---------------------------------------------------------------------------------------

PROBED_SHARES = (0.9, 0.75, 0.5, 0.25)  # kept of a group's units to see how much the outputs move


def output_curves(
    compression: Compression, calibration: Calibration, groups: Sequence[Group], *, provider: str = "cpu"
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones; in between, the
    closed-form loss gives the shape. All these weights are inputs of one session, so that a width costs one small pass.
    """
    mine = [g for g in groups if g.id in compression.forms]
    graph = compression.analysis.traced.model.graph
    names = sorted({n for g in mine for n in trial(compression, g, max(1, g.size - 1))})
    plain = {name: constant_array(graph.initializers[name]) for name in names}
    found: dict[str, FloatArray] = {}
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "probed.onnx"
        save(clean(open_weights(compression.analysis.traced.model, names)), path)
        session = open_session(path, provider=provider, optimise="basic")
        known = {i.name for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        feeds = {k: v for k, v in next(iter(calibration.batches())).items() if k in known}
        dense = session.run(outputs, {**feeds, **plain})
        for group in mine:
            widths = sorted({max(1, round(group.size * share)) for share in PROBED_SHARES} - {group.size})
            moved = {w: session.run(outputs, {**feeds, **plain, **trial(compression, group, w)}) for w in widths}
            curve = compression.curve(group)
            assert curve is not None
            found[group.id] = calibrated(curve, {w: relative_change(dense, m) for w, m in moved.items()})
    return found


def calibrated(curve: FloatArray, measured: Mapping[int, float]) -> FloatArray:
    """The loss curve scaled so that it passes through the measured points; the scale is interpolated between them."""
    widths = np.array(sorted(measured))
    floor = 1e-12 * max(float(curve[0]), 1e-300)
    scales = np.array([measured[w] / max(float(curve[w]), floor) for w in widths])
    scaled = curve * np.exp(np.interp(np.arange(len(curve)), widths, np.log(np.maximum(scales, 1e-300))))
    rising: FloatArray = np.maximum.accumulate(scaled[::-1])[::-1]
    return rising


def relative_change(dense: Sequence[AnyArray], moved: Sequence[AnyArray]) -> float:
    """Mean over outputs of |moved - dense|^2 / |dense|^2."""
    ratios = []
    for a, b in zip(dense, moved, strict=True):
        gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        ratios.append(float(np.sum(gap**2) / max(np.sum(np.asarray(a, np.float64) ** 2), 1e-300)))
    return float(np.mean(ratios))


def trial(compression: Compression, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width`` in closed form, and what was cut silent: constant name -> array."""
    analysis = compression.analysis
    elimination = compression.eliminations.get(group.id)
    if elimination is not None:
        rows: tuple[tuple[int, ...], ...] = (tuple(sorted(int(k) for k in elimination.order[group.size - width :])),)
    else:
        rows = tuple(tuple(range(width)) for _ in range(group.blocks))
    plan = Plan(analysis, "", {}, {group.id: rows}, "auto")
    edits = edits_for(compression, plan)
    source = analysis.traced
    graph = source.model.graph
    nodes = {n.name: n for n in graph}
    for node, vector in edits.biases.items():
        bias = existing_bias(nodes[node], len(vector))
        if bias is not None:
            edits.changes.setdefault(str(bias.name), []).append(partial(shifted, vector=vector))
    changed = {name: constant_array(graph.initializers[name]).astype(np.float64) for name in edits.changes}
    for name, changes in edits.changes.items():
        for change in changes:
            changed[name] = change(changed[name])
    dead = dead_units(source.trace, source.units, cuts_of(plan))
    for axis, gone in removed_positions(source.trace, dead):
        name = str(axis.constant.name)
        if name in changed:
            np.moveaxis(changed[name], axis.axis, 0)[gone] = 0.0
    return {name: array.astype(constant_array(graph.initializers[name]).dtype) for name, array in changed.items()}


def shifted(array: FloatArray, vector: FloatArray) -> FloatArray:
    return array + vector.reshape(array.shape)


def constant_array(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()


def open_weights(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` in which these constants are inputs."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy


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
    return traced(edited(source, edits_for(compression, plan)), source.sizes)


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
