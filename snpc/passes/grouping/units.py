"""Resolves the label table to units, blocks and heads.

1. Labels that pairs connect are one *unit*.
2. Covers of kind "batch" (one score matrix per head, for example) say which units form one *block*, and so do
products that are computed for one head alone.
3. A cover of kind "aligned" either covers one whole block, and its coarse label belongs to the head, or it spans
several blocks (a rotary table that all heads share), and everything it covers is one unit. Repeated until nothing
changes. 4. *Heads* are found apart from units, among what pairs alone connect (``heads.py``): a unit that all heads
share has a part in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from snpc.graph import connected_components
from snpc.passes.grouping.heads import assign_heads, whole_head_units
from snpc.passes.propagation import Cover, LabelTable, RemovedUnits
from snpc.types import BoolArray, IntArray


@dataclass(frozen=True)
class Units:
    """``unit_of_label[label]``: the unit, named by its smallest label. ``block_of_unit[unit]``: the block, named by its
    smallest unit (-1: none). ``cell_of_label[label]``: the cell, which is the part of a unit that lies in one head, and
    no finer than pairs tell. ``head_of_label[label]``: the head, named by a cell (-1: none). ``whole_heads``: units
    that stand for a head, or for several channels of one."""

    unit_of_label: IntArray
    block_of_unit: IntArray
    cell_of_label: IntArray
    head_of_label: IntArray
    whole_heads: IntArray

    def removal(self, units: BoolArray, heads: BoolArray | None = None) -> RemovedUnits:
        """Remove ``units`` and ``heads``, each true at the names of those that go."""
        removed = units[self.unit_of_label]
        if heads is not None:
            removed |= (self.head_of_label >= 0) & heads[self.head_of_label]
        return RemovedUnits(removed, self.block_of_unit[self.unit_of_label])


def resolve_units(table: LabelTable, tied: Sequence[tuple[IntArray, IntArray]] = ()) -> Units:
    """Units, blocks and heads of all labels. ``tied``: pairs of labels that are one unit, but not one cell."""
    cell = connected_components(table.count, table.pairs)
    pairs = [*table.pairs, *tied]
    batch = [s for s in table.covers if s.kind == "batch"]
    aligned = sorted((s for s in table.covers if s.kind == "aligned"), key=lambda s: s.fine.shape[1])
    while True:
        unit = connected_components(table.count, pairs)
        block = assign_blocks(unit, batch, table.products, table.count)
        new_pairs = next_unifications(batch, aligned, unit, block)
        if not new_pairs:
            break
        pairs += new_pairs
    head = assign_heads(table.covers, cell)
    return Units(unit, block, cell, head, whole_head_units(table.covers, unit, head))


def next_unifications(
    batch: Sequence[Cover], aligned: Sequence[Cover], unit: IntArray, block: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """Pairs to unify next. Small covers come first: they may form blocks that a larger cover then covers as a whole."""
    sizes = block_sizes(unit, block)
    for _, covers in groupby(aligned, key=lambda s: s.fine.shape[1]):
        new_pairs = pairs_to_unify(
            (pair for cover in covers for pair in unify_across_blocks(cover, unit, block, sizes)), unit
        )
        if new_pairs:
            return new_pairs
    return pairs_to_unify((pair for cover in batch for pair in unify_keys_of_equal_rows(cover, unit, block)), unit)


def pairs_to_unify(pairs: Iterable[tuple[IntArray, IntArray]], unit: IntArray) -> list[tuple[IntArray, IntArray]]:
    """The pairs that connect different units."""
    return [(a, b) for a, b in pairs if bool((unit[a] != unit[b]).any())]


def units_of_cover(cover: Cover, unit: IntArray) -> tuple[IntArray, IntArray]:
    """(units of the coarse labels [rows], sorted units of the fine labels [rows, members])."""
    return unit[cover.coarse], np.sort(unit[cover.fine], axis=1)


def assign_blocks(unit: IntArray, batch: Sequence[Cover], products: Sequence[IntArray], count: int) -> IntArray:
    """Units that occur in the same rows of the batch covers and in the same ``products`` are one block, named by its
    smallest unit.

    A unit of one head occurs in the rows of that head. A unit that all heads share (a rotary pair) occurs in all rows;
    such units form a block of their own.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(count, np.uint64)
    for cover in batch:
        _, members = units_of_cover(cover, unit)
        row = np.repeat(np.arange(len(members)), members.shape[1])
        pairs = np.unique(np.stack([row, members.reshape(-1)], 1), axis=0)
        row_keys = rng.integers(1, 1 << 63, len(members), dtype=np.uint64)
        np.add.at(signature, pairs[:, 1], row_keys[pairs[:, 0]])
    for labels in products:
        signature[np.unique(unit[labels])] += rng.integers(1, 1 << 63, dtype=np.uint64)
    order = np.unique(unit)
    _, first, inverse = np.unique(signature[order], return_index=True, return_inverse=True)
    block = np.full(count, -1, np.int64)
    block[order] = np.where(signature[order] > 0, order[first][inverse], -1)
    return block


def count_distinct_units(members: IntArray) -> IntArray:
    """[rows]: the number of different units in each sorted row."""
    return 1 + (np.diff(members, axis=1) != 0).sum(1) if members.shape[1] > 1 else np.ones(len(members), np.int64)


def block_sizes(unit: IntArray, block: IntArray) -> IntArray:
    """[units]: the number of units in each block."""
    units = np.unique(unit)
    blocks = block[units]
    return np.bincount(blocks[blocks >= 0], minlength=len(unit))


def unify_across_blocks(
    cover: Cover, unit: IntArray, block: IntArray, sizes: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """Pairs that make each row one unit, unless the row consists of whole blocks."""
    keys, members = units_of_cover(cover, unit)
    merge = ~are_whole_blocks(members, block, sizes)
    kept = members[merge]
    first = np.repeat(keys[merge][:, None], members.shape[1], 1)
    return [(first.reshape(-1), kept.reshape(-1))] if merge.any() else []


def are_whole_blocks(members: IntArray, block: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
    """[rows]: whether the row consists of whole blocks and has more than one unit.

    Blocks of one unit each do not count: such a row may as well hold one channel of each head, where a statistic made
    each head one unit.
    """
    blocks = np.sort(block[members], axis=1)
    firsts = np.ones(blocks.shape, bool)
    firsts[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    expected = (sizes[np.maximum(blocks, 0)] * firsts).sum(1)
    count = count_distinct_units(members)
    several = (sizes[np.maximum(blocks, 0)] > 1).any(1)
    whole: npt.NDArray[np.bool_] = (blocks[:, 0] >= 0) & (count == expected) & (count > 1) & several
    return whole


def unify_keys_of_equal_rows(cover: Cover, unit: IntArray, block: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Pairs of keys whose rows have the same units (query heads that share a key head)."""
    keys, members = units_of_cover(cover, unit)
    order = np.lexsort(members.T[::-1])
    keys, members = keys[order], members[order]
    again = (members[1:] == members[:-1]).all(1)
    return [(keys[:-1][again], keys[1:][again])] if again.any() else []
