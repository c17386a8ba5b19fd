"""Sequential fitting: each layer is fitted to what the cut layers before it give, and makes up for what they lost.

The graph is run in segments that end where a group's reader meets the residual stream. What crosses their borders is
kept for every calibration batch, for the dense model and for the cut one, so nothing is computed twice: per segment one
pass of the dense one, one of the measured one, one of the fitted one.

A reader of hidden units is fitted to more than its own output: the gap between the dense and the cut residual stream
behind it is regressed on its kept units, heavily damped, and added (asymmetric calibration as in GPTAQ, arXiv
2504.02692, with a whole layer as the unknown). Groups whose weights are used in several segments keep the parallel fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from snpc.graph.subgraph import Segment, extract
from snpc.passes.canonicalization.finalize import clean
from snpc.passes.grouping.traced import Traced, traced
from snpc.passes.weights.consumers import reader_of
from snpc.passes.weights.edits import Edits
from snpc.planning.plan import Plan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.algebra import damped_solution
from snpc.runtime.closed_form.fit import Compression, edits_for, rotations
from snpc.runtime.closed_form.masked_weights import edited_constants, silent_constants
from snpc.runtime.closed_form.stages import Gap, NotSequential, Stage, stages_of, with_biases
from snpc.runtime.execution.memory import Shelf, memory_budget
from snpc.runtime.execution.session import NotLoaded
from snpc.runtime.execution.temporary_session import scratch
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.measure import add_up
from snpc.runtime.statistics.moments import Measured, Moments, moments_of
from snpc.runtime.statistics.padding import Masks, Padding, padding_of, probe_rows, token_masks
from snpc.types import AnyArray, FloatArray

DAMPING = 1.0  # of the mean diagonal, in the regression of the gap on the hidden units

Values = dict[str, AnyArray]
Contents = dict[str, AnyArray]  # of constants, by name


@dataclass
class Carry:
    """What later segments need of the dense and of the cut model, per calibration batch; ``masks`` say which tokens
    count. What does not fit on the ``shelf`` lies in temporary files."""

    dense: list[Values]
    cut: list[Values]
    masks: list[Masks]
    shelf: Shelf

    def keep(self, values: Values) -> Values:
        return {name: self.shelf.keep(array) for name, array in values.items()}


def fit_sequentially(
    compression: Compression,
    plan: Plan,
    calibration: Calibration,
    provider: str = "cpu",
    memory_limit: int | None = None,
) -> Traced:
    """The model at its full size with every weight made for the plan, layer after layer.

    Of what crosses the borders of segments, what is more than ``memory_limit`` bytes (None: half of what is free) lies
    in temporary files.

    Raises stages.NotSequential where the graph cannot be run in segments.
    """
    base = with_biases(compression, plan)
    stages = stages_of(compression.analysis, base, plan)
    staged = {g.id for stage in stages for g in stage.groups}
    before = replace(plan, keep={k: v for k, v in plan.keep.items() if k not in staged})
    contents = edited_constants(base, edits_for(compression, before))
    probes = ((w.probe, w.group.blocks * w.group.size) for stage in stages for w in stage.wanted)
    padding = padding_of(compression.analysis.traced, probe_rows(probes))
    carry = Carry([], [], [], Shelf(memory_budget(memory_limit)))
    with token_masks(compression.analysis.traced, padding, provider) as masks:
        for feeds in calibration.batches():
            carry.masks.append(masks(feeds))
            carry.dense.append(carry.keep(feeds))
            carry.cut.append(dict(carry.dense[-1]))
    for stage in stages:
        contents |= fit_stage(Fitting(base, plan, before, provider, padding), stage, contents, carry)
    return traced(holding(base.model.clone(), contents), base.sizes, kv_cache=base.kv_cache)


def holding(model: ir.Model, contents: Contents) -> ir.Model:
    """``model``, with these contents of its constants."""
    for name, array in contents.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)
    return model


@dataclass(frozen=True)
class Fitting:
    """What stays the same from stage to stage. ``before``: the part of the plan that was fitted beforehand."""

    base: Traced
    plan: Plan
    before: Plan
    provider: str
    padding: Padding

    def model(self, segment: Segment, contents: Contents, keep: Mapping[str, tuple[tuple[int, ...], ...]]) -> ir.Model:
        """The segment with new contents of its constants, and what ``keep`` cuts silent."""
        model = clean(extract(self.base.model, segment, self.base.facts))
        cuts = cuts_of(replace(self.plan, keep={**self.before.keep, **keep}))
        return holding(model, silent_constants(self.base, contents, cuts, set(model.graph.initializers)))

    def run(self, model: ir.Model, feeds: list[Values]) -> Iterator[Values]:
        """Outputs per batch. Raises NotSequential where onnxruntime makes no session of the piece (its shape inference
        may need what lies before)."""
        try:
            with scratch(model, provider=self.provider, memory="shared") as run:
                for values in feeds:
                    yield run(values)
        except NotLoaded as error:
            raise NotSequential(str(error)) from error


def fit_stage(fitting: Fitting, stage: Stage, contents: Contents, carry: Carry) -> Contents:
    """Fit the stage's groups; ``carry`` moves on to the end of its segment. Returns new contents of constants;
    ``contents``: of the stages before."""
    segment = stage.segment
    wide = replace(segment, outputs=tuple({**dict.fromkeys(segment.outputs), **{g.value: None for g in stage.gaps}}))
    whole = fitting.run(clean(extract(fitting.base.model, wide, fitting.base.facts)), carry.dense)
    dense = [carry.keep(values) for values in whole]
    found = edited_constants(fitting.base, solve(fitting, stage, contents, carry, dense), contents)
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    cut = fitting.run(fitting.model(segment, {**contents, **found}, mine), carry.cut)
    for held, dense_values, old, cut_values in zip(carry.dense, dense, carry.cut, cut, strict=True):
        advance(held, dense_values, segment)
        advance(old, carry.keep(cut_values), segment)
    return found


def advance(held: Values, made: Values, segment: Segment) -> None:
    held.update(made)
    for name in set(held) - segment.needed:
        del held[name]


def solve(fitting: Fitting, stage: Stage, contents: Contents, carry: Carry, dense: list[Values]) -> Edits:
    """The edits of the stage's groups, from what the cut model gives."""
    if not stage.wanted:
        return Edits()
    instrument = Instrument(fitting.model(stage.segment, contents, {}), fitting.padding.told)
    for item in stage.wanted:
        item.add_to(instrument)
    types = {str(v.name): dtype for v, dtype in fitting.base.facts.dtype.items() if dtype is not None}
    for gap in stage.gaps:
        cross, total = instrument.gap(gap.wanted.probe, gap.group.size, gap.value, dense_input(gap), types[gap.value])
        instrument.expose(cross, gap.cross)
        instrument.expose(total, gap.total)
    feeds = [
        {**cut, **counts, **{dense_input(g): values[g.value] for g in stage.gaps}}
        for cut, counts, values in zip(carry.cut, carry.masks, dense, strict=True)
    ]
    sums: dict[str, FloatArray] = {}
    for result in fitting.run(clean(instrument.model), feeds):
        for name, array in result.items():
            if name not in sums:
                sums[name] = np.zeros(array.shape)
            add_up(sums[name], array)
    measured = moments_from(stage, sums, fitting)
    mine = {g.id: fitting.plan.keep[g.id] for g in stage.groups if g.id in fitting.plan.keep}
    edits = edits_for(rotations(measured, stage.groups), replace(fitting.plan, keep=mine))
    for gap in stage.gaps:
        close_gap(edits, fitting, measured.moments[gap.group.id], gap, sums)
    return edits


def moments_from(stage: Stage, sums: Mapping[str, FloatArray], fitting: Fitting) -> Measured:
    found: dict[str, dict[str, FloatArray]] = {}
    for item in stage.wanted:
        mine = found.setdefault(item.group.id, {})
        mine[item.name] = mine.get(item.name, 0.0) + sums[item.output]
    moments = {name: moments_of(stage.forms[name], arrays) for name, arrays in found.items()}
    return Measured(fitting.plan.analysis, stage.forms, moments, {})


def dense_input(gap: Gap) -> str:
    return f"{gap.value}__dense"


def close_gap(edits: Edits, fitting: Fitting, moments: Moments, gap: Gap, sums: Mapping[str, FloatArray]) -> None:
    """Add to the reader what explains most of the gap behind it from the kept hidden units."""
    reader = reader_of(fitting.base, gap.group)
    rows = fitting.plan.keep.get(gap.group.id)
    keep = np.array(rows[0] if rows else range(gap.group.size), np.int64)
    (seen,) = moments.contexts[0]
    (mean,), total = seen.means, sums[gap.total].reshape(-1)
    cross = sums[gap.cross].reshape(gap.group.size, -1) - np.outer(mean, total)
    more = damped_solution(seen.moment[np.ix_(keep, keep)], cross[keep], DAMPING)
    edits.add(reader.place, 0, keep, more)
    edits.add_bias(str(reader.node.name), total / seen.count - mean[keep] @ more)
