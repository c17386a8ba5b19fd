"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from snpc.passes.edit import Edits
from snpc.passes.plan import Plan, Scores, cuts_of, keep_best
from snpc.runtime.calibration import Calibration
from snpc.runtime.chain import chain_of
from snpc.runtime.feeds import Feeds
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.silent import silent_constants
from snpc.types import AnyArray, FloatArray, Group

PROBED_SHARES = (0.92, 0.83, 0.67, 0.5, 0.33, 0.17)  # kept of a group's units to see what moves behind its layer
TRACED_SHARES = (0.83, 0.5, 0.17)  # ... and how much of that arrives at the outputs
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

    Measured one group at a time, with silenced weights instead of sliced ones: at a few widths how much what leaves the
    group's segment of the graph changes, and at some of them how much of that arrives at the outputs. The closed-form
    loss gives the shape in between. ``scores`` say which units go first.
    """
    tried = {g.id: trial(compression, scores, g, min(probed_widths(g))) for g in groups}
    found: dict[str, FloatArray] = {}
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        chain = chain_of(compression.analysis, tried, Path(folder), provider)
        dense = [chain.states(feeds) for feeds in few_samples(calibration)]
        for group in groups:
            near, far = {}, {}
            traced = widths_at(group, TRACED_SHARES)
            for width in probed_widths(group):
                arrays = trial(compression, scores, group, width)
                changes = [
                    chain.changes(states, group.id, arrays, relative_change, width in traced) for states in dense
                ]
                near[width] = float(np.mean([c[0] for c in changes]))
                if width in traced:
                    far[width] = float(np.mean([c[1] for c in changes]))
            found[group.id] = calibrated(calibrated(shape_of(compression, group), near), far)
    return found


def few_samples(calibration: Calibration) -> list[Feeds]:
    """The first batches, until there are ``PROBED_SAMPLES``; one batch at least."""
    count = max(1, PROBED_SAMPLES // calibration.batch)
    return list(itertools.islice(calibration.batches(), count))


def probed_widths(group: Group) -> list[int]:
    return widths_at(group, PROBED_SHARES)


def widths_at(group: Group, shares: Sequence[float]) -> list[int]:
    return sorted({max(1, round(group.size * share)) for share in shares} - {group.size})


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
        if a.dtype.kind in "biuO":
            continue
        gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        ratios.append(float(np.sum(gap**2) / max(np.sum(np.asarray(a, np.float64) ** 2), 1e-300)))
    return float(np.mean(ratios)) if ratios else 0.0


def trial(compression: Compression, scores: Scores, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width``, in closed form if it has one, and what was cut silent."""
    analysis = compression.analysis
    plan = Plan(analysis, "", {}, {group.id: keep_best(scores.values[group.id], width)}, "auto")
    edits = edits_for(compression, plan) if group.id in compression.forms else Edits()
    return silent_constants(analysis.traced, edits, cuts_of(plan))
