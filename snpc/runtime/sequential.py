"""Sequential fitting: each layer is fitted to what the cut layers before it give, and makes up for what they lost.

The graph is run in segments that end where a group's reader meets the residual stream. What crosses their borders is
kept for every calibration batch, for the dense model and for the cut one, so nothing is computed twice: per segment one
pass of the dense one, one of the measured one, one of the fitted one.

A reader of hidden units is fitted to more than its own output: the gap between the dense and the cut residual stream
behind it is regressed on its kept units, heavily damped, and added (asymmetric calibration as in GPTAQ, arXiv
2504.02692, with a whole layer as the unknown). Groups whose weights are used in several segments keep the parallel fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.closed import damped_solution
from snpc.passes.edit import Edits, edited, joined, reader_of
from snpc.passes.plan import Plan, cuts_of
from snpc.passes.rewrite import Traced, traced
from snpc.passes.segment import Segment, extract
from snpc.runtime.calibration import Calibration
from snpc.runtime.fit import Compression, edits_for, rotations
from snpc.runtime.measure import Instrument
from snpc.runtime.model_io import clean, save
from snpc.runtime.moments import Measured, Moments, moments_of
from snpc.runtime.session import open_session
from snpc.runtime.silent import biases_as_changes, silent_constants
from snpc.runtime.stages import Gap, Stage, stages_of, with_biases
from snpc.types import AnyArray, FloatArray

DAMPING = 1.0  # of the mean diagonal, in the regression of the gap on the hidden units

Values = dict[str, AnyArray]


@dataclass
class Carry:
    """What later segments need of the dense and of the cut model, per calibration batch."""

    dense: list[Values]
    cut: list[Values]


def fit_sequentially(compression: Compression, plan: Plan, calibration: Calibration, provider: str = "cpu") -> Traced:
    """The model at its full size with every weight made for the plan, layer after layer.

    Raises stages.NotSequential where the graph cannot be run in segments.
    """
    base = with_biases(compression, plan)
    stages = stages_of(compression.analysis, base, plan)
    staged = {g.id for stage in stages for g in stage.groups}
    before = replace(plan, keep={k: v for k, v in plan.keep.items() if k not in staged})
    total = biases_as_changes(base, edits_for(compression, before))
    batches = [dict(feeds) for feeds in calibration.batches()]
    carry = Carry(batches, [dict(feeds) for feeds in batches])
    for stage in stages:
        total = fit_stage(Fitting(base, plan, before, provider), stage, total, carry)
    return traced(edited(base, total), base.sizes, kv_cache=base.kv_cache)


@dataclass(frozen=True)
class Fitting:
    """What stays the same from stage to stage. ``before``: the part of the plan that was fitted beforehand."""

    base: Traced
    plan: Plan
    before: Plan
    provider: str

    def model(self, segment: Segment, edits: Edits, keep: Mapping[str, tuple[tuple[int, ...], ...]]) -> ir.Model:
        """The segment with edits, and what ``keep`` cuts silent."""
        model = clean(extract(self.base.model, segment, self.base.facts))
        names = set(model.graph.initializers)
        cuts = cuts_of(replace(self.plan, keep={**self.before.keep, **keep}))
        for name, array in silent_constants(self.base, edits, cuts, names).items():
            value = model.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
        return model

    def run(self, model: ir.Model, feeds: list[Values]) -> Iterator[Values]:
        """Outputs per batch."""
        with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
            path = Path(folder) / "segment.onnx"
            save(model, path)
            session = open_session(path, provider=self.provider)
            inputs = [i.name for i in session.get_inputs()]
            names = [o.name for o in session.get_outputs()]
            for values in feeds:
                yield dict(zip(names, session.run(names, {k: values[k] for k in inputs}), strict=True))


def fit_stage(fitting: Fitting, stage: Stage, total: Edits, carry: Carry) -> Edits:
    """Fit the stage's groups; ``carry`` moves on to the end of its segment. Returns all edits so far."""
    segment = stage.segment
    wide = replace(segment, outputs=tuple({**dict.fromkeys(segment.outputs), **{g.value: None for g in stage.gaps}}))
    dense = list(fitting.run(clean(extract(fitting.base.model, wide, fitting.base.facts)), carry.dense))
    found = solve(fitting, stage, total, carry, dense)
    total = joined(total, biases_as_changes(fitting.base, found))
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    cut = fitting.run(fitting.model(segment, total, mine), carry.cut)
    for held, dense_values, old, cut_values in zip(carry.dense, dense, carry.cut, cut, strict=True):
        advance(held, dense_values, segment)
        advance(old, cut_values, segment)
    return total


def advance(held: Values, made: Values, segment: Segment) -> None:
    held.update(made)
    for name in set(held) - segment.needed:
        del held[name]


def solve(fitting: Fitting, stage: Stage, done: Edits, carry: Carry, dense: list[Values]) -> Edits:
    """The edits of the stage's groups, from what the cut model gives."""
    instrument = Instrument(fitting.model(stage.segment, done, {}))
    for wanted in stage.wanted:
        instrument.add(wanted)
    types = {str(v.name): dtype for v, dtype in fitting.base.facts.dtype.items() if dtype is not None}
    for gap in stage.gaps:
        cross, total = instrument.gap(gap.wanted.probe, gap.group.size, gap.value, dense_input(gap), types[gap.value])
        instrument.expose(cross, gap.cross)
        instrument.expose(total, gap.total)
    feeds = [
        {**cut, **{dense_input(g): values[g.value] for g in stage.gaps}}
        for cut, values in zip(carry.cut, dense, strict=True)
    ]
    sums: dict[str, FloatArray] = {}
    for result in fitting.run(clean(instrument.model), feeds):
        for name, array in result.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(array, np.float64)
    measured = moments_from(stage, sums, fitting)
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    edits = edits_for(rotations(measured, stage.groups), replace(fitting.plan, keep=mine))
    for gap in stage.gaps:
        close_gap(edits, fitting, measured.moments[gap.group.id], gap, sums)
    return edits


def moments_from(stage: Stage, sums: Mapping[str, FloatArray], fitting: Fitting) -> Measured:
    found: dict[str, dict[str, FloatArray]] = {}
    for item in stage.wanted:
        found.setdefault(item.group.id, {})[item.name] = sums[item.output]
    moments = {name: moments_of(stage.forms[name], arrays) for name, arrays in found.items()}
    return Measured(fitting.plan.analysis, stage.forms, moments, {})


def dense_input(gap: Gap) -> str:
    return f"{gap.value}__dense"


def close_gap(edits: Edits, fitting: Fitting, moments: Moments, gap: Gap, sums: Mapping[str, FloatArray]) -> None:
    """Add to the reader what explains most of the gap behind it from the kept hidden units."""
    reader = reader_of(fitting.base, gap.group)
    rows = fitting.plan.keep.get(gap.group.id)
    keep = np.array(rows[0] if rows else range(gap.group.size), np.int64)
    assert moments.mean is not None
    count, total = moments.count, sums[gap.total].reshape(-1)
    cross = sums[gap.cross].reshape(gap.group.size, -1) - np.outer(moments.mean[0], total)
    more = damped_solution(moments.first[0][np.ix_(keep, keep)], cross[keep], DAMPING)
    edits.add(reader.place, 0, keep, more)
    edits.add_bias(str(reader.node.name), total / count - moments.mean[0][keep] @ more)
