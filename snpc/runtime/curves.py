"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.passes.edit import Edits
from snpc.passes.plan import Plan, Scores, cuts_of, keep_best
from snpc.runtime.calibration import Calibration
from snpc.runtime.chain import States, chain_of
from snpc.runtime.feeds import Feeds
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.memory import Shelf, memory_budget
from snpc.runtime.padding import Counts, Masks, Padding, padding_of, token_masks
from snpc.runtime.silent import silent_constants
from snpc.types import AnyArray, FloatArray, Group, IntArray

PROBED_SHARES = (0.92, 0.83, 0.67, 0.5, 0.33, 0.17)  # kept of a group's units to see how much the outputs move
PROBED_SAMPLES = 4  # per width: 8 say no more of which group minds most, since all groups see the same
SMOOTH = 0.7  # as a logarithm: half as much again is noise, twice as much is shape
POOLS = 4  # that many times other samples, in turn


def output_curves(
    compression: Compression,
    scores: Scores,
    calibration: Calibration,
    groups: Sequence[Group],
    *,
    memory_limit: int | None = None,
    provider: str = "cpu",
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones, from where the group
    lies on; in between, the closed-form loss gives the shape. Neighbouring widths see different samples: what samples
    do to all groups is taken off, and a smooth line through what is left averages over more of them than each width
    sees. ``scores`` say which units go first. Padded tokens of an output [batch, tokens, ..] do not count. Of what the
    dense model gives, what is more than ``memory_limit`` bytes (None: half of what is free) is kept in temporary files.
    """
    analysis = compression.analysis
    tried = {g.id: trial(compression, scores, g, min(probed_widths(g), default=g.size)) for g in groups}
    found: list[Change] = []
    padding = padding_of(analysis.traced, [(spec.name, leading) for spec in analysis.model.outputs])
    with token_masks(analysis.traced, padding, provider) as masks, chain_of(analysis, tried, provider) as chain:
        shelf = Shelf(memory_budget(memory_limit))
        pools = [
            [Sample(chain.states(feeds, shelf), padded(masks(feeds), padding)) for feeds in batches]
            for batches in pools_of(calibration)
        ]
        for turn, group in enumerate(groups):
            for k, width in enumerate(probed_widths(group)):
                number = (turn + k) % len(pools)
                arrays = trial(compression, scores, group, width) if k else tried.pop(group.id)
                gaps = [one.change(chain.changed(one.states, group.id, arrays)) for one in pools[number]]
                found.append(Change(group, width, number, float(np.mean(gaps))))
    shapes = {g.id: shape_of(compression, g) for g in groups}
    return fitted_curves(shapes, found)


def leading(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of an output [batch, tokens, ..]."""
    return (shape[0], shape[1]) if len(shape) > 2 else (0, 0)


def padded(masks: Masks, padding: Padding) -> dict[str, Counts]:
    """Output -> bool [batch, tokens]: does the token count?"""
    return {name: masks[told.name] for name, told in padding.told.items() if told.order == "plain"}


@dataclass(frozen=True)
class Sample:
    """One batch that weights are tried on: what the dense model makes of it, and which tokens of its outputs count."""

    states: States
    counts: Mapping[str, Counts]

    def change(self, moved: Mapping[str, AnyArray]) -> float:
        return mean_change(self.states[-1], moved, self.counts)


@dataclass(frozen=True)
class Change:
    """Relative squared change of the outputs, with ``group`` at ``width``, on the samples of a pool."""

    group: Group
    width: int
    pool: int
    value: float


def fitted_curves(shapes: Mapping[str, FloatArray], found: Sequence[Change]) -> dict[str, FloatArray]:
    """Each shape scaled to what was measured, less what the pools do to all groups."""
    points: dict[str, list[Change]] = {name: [] for name in shapes}
    for change in found:
        points[change.group.id].append(change)
    effect = pool_effects(shapes, points)
    return {
        name: calibrated(shapes[name], {c.width: c.value * float(np.exp(-effect[c.pool])) for c in mine})
        for name, mine in points.items()
    }


def pool_effects(shapes: Mapping[str, FloatArray], points: Mapping[str, Sequence[Change]]) -> FloatArray:
    """[pools] logarithms, of mean 0: least squares over all groups of what a parabola per group leaves. A group that no
    parabola fits says little."""
    pools = 1 + max((c.pool for mine in points.values() for c in mine), default=0)
    rows, values = [np.ones((1, pools))], [np.zeros(1)]
    for name, mine in points.items():
        widths = np.array([c.width for c in mine])
        if len(mine) > 3:
            basis = np.vander(widths / (len(shapes[name]) - 1), 3)
            rest = np.eye(len(mine)) - basis @ np.linalg.pinv(basis)
            left = rest @ log_scales(shapes[name], widths, np.array([c.value for c in mine]))
            weight = 1 / (1 + float(left @ left))
            rows.append(weight * rest @ np.eye(pools)[[c.pool for c in mine]])
            values.append(weight * left)
    effect: FloatArray = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0]
    return effect


def log_scales(curve: FloatArray, widths: IntArray, measured: FloatArray) -> FloatArray:
    """How much more was measured at these widths than the curve says, as logarithms."""
    floor = 1e-12 * max(float(curve[0]), 1e-300)
    scales: FloatArray = np.log(np.maximum(measured / np.maximum(curve[widths], floor), 1e-300))
    return scales


def pools_of(calibration: Calibration) -> list[list[Feeds]]:
    """``POOLS`` times ``PROBED_SAMPLES``, from the first batches."""
    count = -(-PROBED_SAMPLES // calibration.batch)
    batches: list[Feeds] = list(itertools.islice(calibration.heads(PROBED_SAMPLES), count * POOLS))
    return [batches[k : k + count] for k in range(0, len(batches), count)]


def probed_widths(group: Group) -> list[int]:
    return sorted({max(1, round(group.size * share)) for share in PROBED_SHARES} - {group.size})


def shape_of(compression: Compression, group: Group) -> FloatArray:
    """The closed-form loss, or where there is none a parabola: changes that add up evenly."""
    curve = compression.curve(group)
    return curve if curve is not None else np.linspace(1.0, 0.0, group.size + 1) ** 2


def calibrated(curve: FloatArray, measured: Mapping[int, float]) -> FloatArray:
    """The loss curve scaled to what was measured: its logarithm by a parabola over the width. Where a parabola misses
    a point by more than ``SMOOTH``, the line goes through all of them instead, straight in between."""
    if not measured:
        return curve
    widths = np.array(sorted(measured))
    scales = log_scales(curve, widths, np.array([measured[int(w)] for w in widths]))
    at = np.clip(np.arange(len(curve)), widths[0], widths[-1])
    line = np.interp(at, widths, scales)
    if len(widths) > 3:
        smooth = np.polynomial.Polynomial.fit(widths, scales, 2)
        if np.abs(smooth(widths) - scales).max() <= SMOOTH:
            line = smooth(at)
    scaled = curve * np.exp(line)
    rising: FloatArray = np.maximum.accumulate(scaled[::-1])[::-1]
    return rising


def mean_change(
    dense: Mapping[str, AnyArray], moved: Mapping[str, AnyArray], counts: Mapping[str, Counts] | None = None
) -> float:
    """Mean over outputs of |moved - dense|^2 / |dense|^2; ``counts``: the tokens that count, by output."""
    counts = counts or {}
    each = [relative_change(dense[k], a, counts.get(k)) for k, a in moved.items() if a.dtype.kind not in "biuO"]
    return float(np.mean(each)) if each else 0.0


def relative_change(dense: AnyArray, moved: AnyArray, counts: Counts | None = None) -> float:
    """|moved - dense|^2 / |dense|^2, in float64, over the tokens that count."""
    dense, moved = np.atleast_1d(dense), np.atleast_1d(moved)
    gap = size = 0.0
    for k in range(len(dense)):  # sample by sample, since logits over a vocabulary are big
        a, b = (np.asarray(array[k] if counts is None else array[k][counts[k]], np.float64) for array in (dense, moved))
        gap += float(np.sum((a - b) ** 2))
        size += float(np.sum(a**2))
    return gap / max(size, 1e-300)


def trial(compression: Compression, scores: Scores, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width``, in closed form if it has one, and what was cut silent."""
    analysis = compression.analysis
    plan = Plan(analysis, "", {}, {group.id: keep_best(scores.values[group.id], width)}, "auto")
    edits = edits_for(compression, plan) if group.id in compression.forms else Edits()
    return silent_constants(analysis.traced, edits, cuts_of(plan))
