"""How a probed tensor is read as rows of units (usually one row per token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from snpc.passes.token_analysis import shortest_period
from snpc.types import BoolArray, IntArray, Probe, Shape

RowOrder = Literal["batch_first", "merged", "tokens_first"]
"""Of rows that are tokens: [batch, tokens], [batch * tokens, 1], or [tokens, batch]."""


@dataclass(frozen=True)
class ProbeLayout:
    """How a probed tensor becomes [rows, units]: axis 0 is split where it merges batch and blocks (``period``: blocks,
    0 for no split), ``row_axes`` are moved in front of ``unit_axes``, and ``columns`` are gathered. ``repeats``: how
    many columns show one unit, at most; a column number that is the ``width`` of the unit axes stands for zeros."""

    period: int
    rank: int
    row_axes: tuple[int, ...]
    unit_axes: tuple[int, ...]
    columns: IntArray
    repeats: int
    width: int

    @property
    def shows_all(self) -> bool:
        """Whether every unit is seen, each as often as the others."""
        return bool((self.columns < self.width).all())

    def is_shown(self, blocks: int) -> BoolArray:
        """[repeats, blocks]: whether any unit of a block is seen there."""
        shown = (self.columns < self.width).reshape(self.repeats, blocks, -1)
        return np.asarray(shown.any(-1), np.bool_)


def infer_probe_layout(probe: Probe, units: int) -> ProbeLayout:
    """The layout of a probe of a group of so many units. It may show only some of them, such as those of one head."""
    unit_at = probe.units
    period = 0
    if unit_at.shape[0] > 1:
        period = shortest_period(np.moveaxis(unit_at, 0, -1).reshape(-1, unit_at.shape[0]))
        unit_at = unit_at[None, :period]
    rank = unit_at.ndim
    unit_axes = tuple(k for k in range(1, rank) if unit_at.shape[k] > 1) or (rank - 1,)
    row_axes = tuple(k for k in range(1, rank) if k not in unit_axes)
    flat = unit_at.transpose(0, *row_axes, *unit_axes).reshape(-1)
    by_unit = np.argsort(flat, kind="stable")[np.count_nonzero(flat < 0) :]
    owner = flat[by_unit]
    occurrence = np.arange(len(owner)) - np.searchsorted(owner, owner)
    repeats = int(occurrence.max()) + 1
    columns = np.full((repeats, units), len(flat), np.int64)
    columns[occurrence, owner] = by_unit
    return ProbeLayout(period, rank, row_axes, unit_axes, columns.reshape(-1), repeats, len(flat))


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
