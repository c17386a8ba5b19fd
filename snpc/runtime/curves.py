"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.passes.edit import Edits
from snpc.passes.plan import Plan, Scores, cuts_of, keep_best
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.scratch import scratch
from snpc.runtime.silent import constant_array, silent_constants
from snpc.types import AnyArray, FloatArray, Group

PROBED_SHARES = (0.92, 0.83, 0.67, 0.5, 0.33, 0.17)  # kept of a group's units to see how much the outputs move
PROBED_SAMPLES = 16


def output_curves(
    compression: Compression,
    scores: Scores,
    calibration: Calibration,
    groups: Sequence[Group],
    *,
    provider: str = "cpu",
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones; in between, the
    closed-form loss gives the shape. All these weights are inputs of one session, so that a width costs one small pass.
    ``scores`` say which units go first.
    """
    analysis = compression.analysis
    graph = analysis.traced.model.graph
    tried = [(g, w, trial(compression, scores, g, w)) for g in groups for w in probed_widths(g)[:1]]
    names = sorted({name for _, _, arrays in tried for name in arrays})
    plain = {name: constant_array(graph.initializers[name]) for name in names}
    found: dict[str, FloatArray] = {}
    with scratch(open_weights(analysis.traced.model, names), provider=provider, optimise="basic") as run:
        batches = few_samples(calibration)
        dense = [list(run({**feeds, **plain}).values()) for feeds in batches]
        for group in groups:
            changes = {}
            for width in probed_widths(group):
                arrays = {**plain, **trial(compression, scores, group, width)}
                moved = [list(run({**feeds, **arrays}).values()) for feeds in batches]
                changes[width] = float(np.mean([relative_change(a, b) for a, b in zip(dense, moved, strict=True)]))
            found[group.id] = calibrated(shape_of(compression, group), changes)
    return found


def few_samples(calibration: Calibration) -> list[Feeds]:
    """The first batches, until there are ``PROBED_SAMPLES``; one batch at least."""
    count = max(1, PROBED_SAMPLES // calibration.batch)
    return list(itertools.islice(calibration.batches(), count))


def probed_widths(group: Group) -> list[int]:
    return sorted({max(1, round(group.size * share)) for share in PROBED_SHARES} - {group.size})


def shape_of(compression: Compression, group: Group) -> FloatArray:
    """The closed-form loss, or where there is none a parabola: changes that add up evenly."""
    curve = compression.curve(group)
    return curve if curve is not None else np.linspace(1.0, 0.0, group.size + 1) ** 2


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


def trial(compression: Compression, scores: Scores, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width``, in closed form if it has one, and what was cut silent."""
    analysis = compression.analysis
    plan = Plan(analysis, "", {}, {group.id: keep_best(scores.values[group.id], width)}, "auto")
    edits = edits_for(compression, plan) if group.id in compression.forms else Edits()
    return silent_constants(analysis.traced, edits, cuts_of(plan))


def open_weights(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` in which these constants are inputs."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy
