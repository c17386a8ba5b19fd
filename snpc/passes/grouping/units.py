"""Resolves the label table to units, blocks and heads.

1. Labels that pairs connect are one *unit*.
2. Covers of kind "batch" (one score matrix per head, for example) say which units form one *block*, and so do
products that are computed for one head alone.
3. A cover of kind "aligned" either covers one whole block, and its coarse label belongs to the head, or it spans
several blocks (a rotary table that all heads share), and everything it covers is one unit. Repeated until nothing
changes. 4. Blocks that are covered by the same label belong to one *head*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from snpc.graph import connected_components
from snpc.passes.propagation import Cover, LabelTable
from snpc.types import IntArray


@dataclass(frozen=True)
class Units:
    """``unit_of_label[label]``: the unit, named by its smallest label. ``block_of_unit[unit]``: the block, named by its
    smallest unit (-1: none). ``head_of_block[block]``: the unit that covers the block (-1: none). ``partial_heads``:
    units that cover only part of a block, or parts of several."""

    unit_of_label: IntArray
    block_of_unit: IntArray
    head_of_block: IntArray
    partial_heads: IntArray


def resolve_units(table: LabelTable) -> Units:
    """Units, blocks and heads of all labels."""
    pairs = list(table.pairs)
    batch = [s for s in table.covers if s.kind == "batch"]
    aligned = sorted((s for s in table.covers if s.kind == "aligned"), key=lambda s: s.fine.shape[1])
    while True:
        unit = connected_components(table.count, pairs)
        block = assign_blocks(unit, batch, table.products, table.count)
        new_pairs = next_unifications(batch, aligned, unit, block)
        if not new_pairs:
            break
        pairs += new_pairs
    head, partial = assign_heads(batch + aligned, unit, block, table.count)
    return Units(unit, block, head, np.unique(np.concatenate(partial)) if partial else np.zeros(0, np.int64))


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


def assign_heads(
    covers: Sequence[Cover], unit: IntArray, block: IntArray, count: int
) -> tuple[IntArray, list[IntArray]]:
    """[units]: the unit that covers each block; and the keys that cover only part of a block, or parts of several."""
    head = np.full(count, -1, np.int64)
    partial: list[IntArray] = []
    sizes = block_sizes(unit, block)
    same_head: list[tuple[IntArray, IntArray]] = []
    for cover in covers:
        keys, members = units_of_cover(cover, unit)
        owner = block[members[:, 0]]
        in_one_block = (block[members] == owner[:, None]).all(1)
        whole = in_one_block & are_whole_blocks(members, block, sizes)
        itself = (members == keys[:, None]).all(1)
        partial.append(keys[~whole & ~itself])
        for key, name in zip(keys[whole], owner[whole], strict=True):
            if head[name] < 0:
                head[name] = key
            elif head[name] != key:
                same_head.append((np.array([head[name]]), np.array([key])))
    if same_head:
        merged = connected_components(count, same_head)
        unit[:] = merged[unit]
        head = np.where(head >= 0, merged[np.maximum(head, 0)], -1)
    return head, [t for t in partial if len(t)]
