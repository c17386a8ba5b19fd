"""Heads: cells that go together where one score matrix, and what is made of it, goes as a whole.

A *cell* is what pairs alone connect, so cells are finer than units: where all heads share a gain or a key head, a unit
has a cell in each head. A head is found among cells, whatever their units are.

1. What batch covers connect is one head: its scores, and the channels of queries, keys and values beneath them.
2. An aligned cover of a head's label adds what it covers (rows of the output projection, beneath the head's name). A
label that covers cells of one head only belongs to that head, too (a gain of that head). One that cuts across heads (a
gain that all share, a key head that all read) belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.graph import connected_components
from snpc.passes.propagation import Cover
from snpc.types import IntArray


def assign_heads(covers: Sequence[Cover], cell: IntArray) -> IntArray:
    """[labels]: the head that each label belongs to, named by the smallest cell that stands for the whole of it; -1
    where it belongs to none. ``cell``: [labels], the cell of each."""
    batch = [edges_of_cover(cover, cell) for cover in covers if cover.kind == "batch"]
    aligned = [edges_of_cover(cover, cell) for cover in covers if cover.kind == "aligned"]
    if not batch:
        return np.full(len(cell), -1, np.int64)
    coarse, fine = (np.concatenate(side) for side in zip(*aligned, strict=True)) if aligned else (cell[:0], cell[:0])
    pairs = batch
    while True:
        component = connected_components(len(cell), pairs)
        is_head = np.zeros(len(cell), bool)
        is_head[component[np.concatenate([side for pair in pairs for side in pair])]] = True
        head = np.where(is_head[component], component, -1)
        more = (head[coarse] >= 0) | (head_of_all(coarse, head[fine], len(cell))[coarse] >= 0)
        more &= component[coarse] != component[fine]
        if not more.any():
            break
        pairs = [*pairs, (coarse[more], fine[more])]
    name = np.full(len(cell), len(cell), np.int64)
    keys = np.concatenate([left for left, _ in batch])
    np.minimum.at(name, component[keys], keys)
    return np.where(head >= 0, name[component], -1)[cell]


def edges_of_cover(cover: Cover, cell: IntArray) -> tuple[IntArray, IntArray]:
    """(cell of the coarse label, cell of a fine label) of every label that is covered."""
    rows = cell[cover.fine]
    return np.repeat(cell[cover.coarse], rows.shape[1]), rows.reshape(-1)


def head_of_all(coarse: IntArray, head_of_fine: IntArray, count: int) -> IntArray:
    """[count]: the one head of all cells that each cell covers; -1 where they are of several, or some are of none."""
    low, high = np.full(count, count, np.int64), np.full(count, -1, np.int64)
    np.minimum.at(low, coarse, head_of_fine)
    np.maximum.at(high, coarse, head_of_fine)
    return np.where(low == high, high, -1)


def whole_head_units(covers: Sequence[Cover], unit: IntArray, head: IntArray) -> IntArray:
    """The units that stand for a head, or for several channels of one, and are no channels themselves."""
    found = [np.zeros(0, np.int64)]
    for cover in covers:
        inside = head[cover.coarse] >= 0
        several = (unit[cover.fine] != unit[cover.coarse][:, None]).any(1)
        found.append(unit[cover.coarse[inside & several]])
    return np.unique(np.concatenate(found))
