"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.closed import steps_of
from snpc.passes.edit import Edits
from snpc.passes.plan import Plan, Scores, cuts_of, keep_best
from snpc.runtime.calibration import Calibration
from snpc.runtime.chain import States, chain_of
from snpc.runtime.curve_fit import Change, fitted_curves
from snpc.runtime.feeds import Feeds
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.memory import Shelf, memory_budget
from snpc.runtime.padding import Counts, Masks, Padding, padding_of, token_masks
from snpc.runtime.silent import silent_constants
from snpc.types import AnyArray, FloatArray, Group

PROBED_SHARES = (0.92, 0.75, 0.5, 0.25)  # kept of a group's units to see how much the outputs move
PROBED_SAMPLES = 4  # per width
POOLS = 2  # that many times other samples, in turn


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
    lies on; in between, the closed-form loss gives the shape (``curve_fit``). Neighbouring widths see different
    samples, so that a line through them averages over more than each width sees. ``scores`` say which units go first.
    Padded tokens of an output [batch, tokens, ..] do not count. Of what the dense model gives, what is more than
    ``memory_limit`` bytes (None: half of what is free) is kept in temporary files.
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


def pools_of(calibration: Calibration) -> list[list[Feeds]]:
    """``POOLS`` times ``PROBED_SAMPLES``, from the first batches."""
    count = -(-PROBED_SAMPLES // calibration.batch)
    batches: list[Feeds] = list(itertools.islice(calibration.heads(PROBED_SAMPLES), count * POOLS))
    return [batches[k : k + count] for k in range(0, len(batches), count)]


def probed_widths(group: Group) -> list[int]:
    """Widths at which the elimination of the group's units knows what is left of its reader."""
    known = steps_of(group.size)[:-1]
    return sorted({min(known, key=lambda width: abs(width - group.size * share)) for share in PROBED_SHARES if known})


def shape_of(compression: Compression, group: Group) -> FloatArray:
    """The closed-form loss, or where there is none a parabola: changes that add up evenly."""
    curve = compression.curve(group)
    return curve if curve is not None else np.linspace(1.0, 0.0, group.size + 1) ** 2


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
