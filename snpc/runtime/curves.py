"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.passes.edit import Edits
from snpc.passes.plan import Plan, Scores, cuts_of, keep_best
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.memory import Shelf, memory_budget
from snpc.runtime.padding import Counts, Masks, Padding, padding_of, token_masks
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
    memory_limit: int | None = None,
    provider: str = "cpu",
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones; in between, the
    closed-form loss gives the shape. All these weights are inputs of one session, so that a width costs one small pass.
    ``scores`` say which units go first. Padded tokens of an output [batch, tokens, ..] do not count. Of the dense
    outputs, what is more than ``memory_limit`` bytes (None: half of what is free) is kept in temporary files.
    """
    analysis = compression.analysis
    graph = analysis.traced.model.graph
    names = sorted({n for g in groups for w in probed_widths(g)[:1] for n in trial(compression, scores, g, w)})
    plain = {name: constant_array(graph.initializers[name]) for name in names}
    found: dict[str, FloatArray] = {}
    shelf = Shelf(memory_budget(memory_limit))
    padding = padding_of(analysis.traced, [(spec.name, leading) for spec in analysis.model.outputs])
    with (
        token_masks(analysis.traced, padding, provider) as masks,
        scratch(open_weights(analysis.traced.model, names), provider=provider, optimise="basic") as run,
    ):
        trials = [Trial(feeds, padded(masks(feeds), padding), {}) for feeds in few_samples(calibration)]
        for one in trials:
            one.dense.update({name: shelf.keep(array) for name, array in run({**one.feeds, **plain}).items()})
        for group in groups:
            changes = {}
            for width in probed_widths(group):
                arrays = {**plain, **trial(compression, scores, group, width)}
                changes[width] = float(np.mean([one.change(run({**one.feeds, **arrays})) for one in trials]))
            found[group.id] = calibrated(shape_of(compression, group), changes)
    return found


def leading(shape: Sequence[int]) -> tuple[int, int]:
    """(samples, rows of each) of an output [batch, tokens, ..]."""
    return (shape[0], shape[1]) if len(shape) > 2 else (0, 0)


def padded(masks: Masks, padding: Padding) -> dict[str, Counts]:
    """Output -> bool [batch, tokens]: does the token count?"""
    return {name: masks[told.name] for name, told in padding.told.items() if told.order == "plain"}


@dataclass(frozen=True)
class Trial:
    """One batch that weights are tried on: its inputs, which tokens of its outputs count, and what the model gives."""

    feeds: Feeds
    counts: Mapping[str, Counts]
    dense: dict[str, AnyArray]

    def change(self, moved: Mapping[str, AnyArray]) -> float:
        """Mean over outputs of |moved - dense|^2 / |dense|^2."""
        each = [relative_change(array, moved[name], self.counts.get(name)) for name, array in self.dense.items()]
        return float(np.mean(each))


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


def open_weights(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` in which these constants are inputs."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy
