"""How a probed tensor is read as rows of units (usually one row per token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from snpc.errors import CheckFailed
from snpc.passes.token_analysis import shortest_period
from snpc.types import IntArray, Probe, Shape

RowOrder = Literal["batch_first", "merged", "tokens_first"]
"""Of rows that are tokens: [batch, tokens], [batch * tokens, 1], or [tokens, batch]."""


@dataclass(frozen=True)
class ProbeLayout:
    """How a probed tensor becomes [rows, units]: axis 0 is split where it merges batch and blocks (``period``: blocks,
    0 for no split), ``row_axes`` are moved in front of ``unit_axes``, and ``columns`` are gathered. ``repeats``: how
    many columns show one unit."""

    period: int
    rank: int
    row_axes: tuple[int, ...]
    unit_axes: tuple[int, ...]
    columns: IntArray
    repeats: int


def infer_probe_layout(probe: Probe, units: int) -> ProbeLayout:
    """The layout of a probe that shows so many units. Raises CheckFailed where it shows some of them more often."""
    unit_at = probe.units
    period = 0
    if unit_at.shape[0] > 1:
        period = shortest_period(np.moveaxis(unit_at, 0, -1).reshape(-1, unit_at.shape[0]))
        unit_at = unit_at[None, :period]
    rank = unit_at.ndim
    unit_axes = tuple(k for k in range(1, rank) if unit_at.shape[k] > 1) or (rank - 1,)
    row_axes = tuple(k for k in range(1, rank) if k not in unit_axes)
    flat = unit_at.transpose(0, *row_axes, *unit_axes).reshape(-1)
    counts = np.bincount(flat[flat >= 0], minlength=units)
    repeats = int(counts.min())
    if not repeats or counts.max() != repeats or len(counts) > units:
        raise CheckFailed(f"{probe.tensor}: some of its units are seen more often than others")
    by_unit = np.argsort(flat, kind="stable")[np.count_nonzero(flat < 0) :].reshape(units, repeats)
    order = by_unit.T.reshape(-1)
    return ProbeLayout(period, rank, row_axes, unit_axes, order, repeats)


def samples_and_rows(layout: ProbeLayout, shape: Shape) -> tuple[int, int]:
    """(samples, rows of each) of a probed tensor of this shape."""
    split = (shape[0] // layout.period, layout.period, *shape[1:]) if layout.period else shape
    return split[0], int(np.prod([split[k] for k in layout.row_axes], dtype=np.int64))


@dataclass(frozen=True)
class RowMask:
    """Which rows of a tensor count: those where the input ``name``, bool [batch, tokens], is true. ``order``: how the
    tensor's rows are arranged."""

    name: str
    order: RowOrder
