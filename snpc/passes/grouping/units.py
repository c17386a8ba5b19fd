"""From the book to units, blocks and heads.

1. Labels joined by pairs are one *unit*.
2. A slab seen at a batch axis (one score matrix per head, say) says which units are one *block*.
3. A slab seen elsewhere either covers one whole block (then its key belongs to the head), or it cuts across blocks (a
   rotary table shared by all heads): then everything in a slab is one unit. Repeat until nothing changes.
4. Blocks whose keys are one label belong to one *head*.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from snpc.graph.union_find import connected_components
from snpc.passes.propagation.labels import Cover, LabelTable
from snpc.types import IntArray


@dataclass(frozen=True)
class Units:
    """``unit[label]`` names each label's unit by its smallest label; ``block[unit]`` its block (-1: none);
    ``head[block]`` the unit that covers the block (-1: none)."""

    unit_of_label: IntArray
    block_of_unit: IntArray
    head_of_block: IntArray
    partial_heads: IntArray


def resolve_units(book: LabelTable) -> Units:
    pairs = list(book.pairs)
    batch = [s for s in book.covers if s.kind == "batch"]
    meet = sorted((s for s in book.covers if s.kind == "meet"), key=lambda s: s.fine.shape[1])
    while True:
        unit = connected_components(book.count, pairs)
        block = assign_blocks(unit, batch, book.count)
        news = next_unifications(batch, meet, unit, block)
        if not news:
            break
        pairs += news
    head, crossed = assign_heads(batch + meet, unit, block, book.count)
    return Units(unit, block, head, np.unique(np.concatenate(crossed)) if crossed else np.zeros(0, np.int64))


def next_unifications(
    batch: Sequence[Cover], meet: Sequence[Cover], unit: IntArray, block: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """What to join next. Small slabs first: they may put units into blocks that a larger slab then covers whole."""
    sizes = block_sizes(unit, block)
    for _, slabs in groupby(meet, key=lambda s: s.fine.shape[1]):
        news = pairs_to_unify((pair for slab in slabs for pair in unify_across_blocks(slab, unit, block, sizes)), unit)
        if news:
            return news
    return pairs_to_unify((pair for slab in batch for pair in unify_keys_of_equal_rows(slab, unit, block)), unit)


def pairs_to_unify(pairs: Iterable[tuple[IntArray, IntArray]], unit: IntArray) -> list[tuple[IntArray, IntArray]]:
    return [(a, b) for a, b in pairs if bool((unit[a] != unit[b]).any())]


def units_of_cover(slab: Cover, unit: IntArray) -> tuple[IntArray, IntArray]:
    return unit[slab.coarse], np.sort(unit[slab.fine], axis=1)


def assign_blocks(unit: IntArray, batch: Sequence[Cover], count: int) -> IntArray:
    """Units that occur in the same rows of the batch slabs are one block, named by its smallest unit.

    A unit of one head occurs in that head's rows; one that all heads share (a rotary pair) in all of them, and is a
    block of its own kind.
    """
    rng = np.random.default_rng(0)
    marks = np.zeros(count, np.uint64)
    for slab in batch:
        _, members = units_of_cover(slab, unit)
        row = np.repeat(np.arange(len(members)), members.shape[1])
        pairs = np.unique(np.stack([row, members.reshape(-1)], 1), axis=0)
        row_marks = rng.integers(1, 1 << 63, len(members), dtype=np.uint64)
        np.add.at(marks, pairs[:, 1], row_marks[pairs[:, 0]])
    order = np.unique(unit)
    _, first, inverse = np.unique(marks[order], return_index=True, return_inverse=True)
    block = np.full(count, -1, np.int64)
    block[order] = np.where(marks[order] > 0, order[first][inverse], -1)
    return block


def count_distinct_units(members: IntArray) -> IntArray:
    """[rows]: how many different units each sorted row holds."""
    return 1 + (np.diff(members, axis=1) != 0).sum(1) if members.shape[1] > 1 else np.ones(len(members), np.int64)


def block_sizes(unit: IntArray, block: IntArray) -> IntArray:
    units = np.unique(unit)
    blocks = block[units]
    return np.bincount(blocks[blocks >= 0], minlength=len(unit))


def unify_across_blocks(
    slab: Cover, unit: IntArray, block: IntArray, sizes: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """Pairs that make each row one unit, unless the row is one whole block, or several."""
    keys, members = units_of_cover(slab, unit)
    merge = ~are_whole_blocks(members, block, sizes)
    kept = members[merge]
    first = np.repeat(keys[merge][:, None], members.shape[1], 1)
    return [(first.reshape(-1), kept.reshape(-1))] if merge.any() else []


def are_whole_blocks(members: IntArray, block: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
    """[rows]: the row holds blocks entirely, and more than one unit."""
    blocks = np.sort(block[members], axis=1)
    firsts = np.ones(blocks.shape, bool)
    firsts[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    expected = (sizes[np.maximum(blocks, 0)] * firsts).sum(1)
    count = count_distinct_units(members)
    found: npt.NDArray[np.bool_] = (blocks[:, 0] >= 0) & (count == expected) & (count > 1)
    return found


def unify_keys_of_equal_rows(slab: Cover, unit: IntArray, block: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Rows that hold the same units have the same key (query heads that share a key head)."""
    keys, members = units_of_cover(slab, unit)
    order = np.lexsort(members.T[::-1])
    keys, members = keys[order], members[order]
    again = (members[1:] == members[:-1]).all(1)
    return [(keys[:-1][again], keys[1:][again])] if again.any() else []


def assign_heads(
    slabs: Sequence[Cover], unit: IntArray, block: IntArray, count: int
) -> tuple[IntArray, list[IntArray]]:
    """The unit that covers each block, and the keys that cover only part of one, or several."""
    head = np.full(count, -1, np.int64)
    torn: list[IntArray] = []
    sizes = block_sizes(unit, block)
    links: list[tuple[IntArray, IntArray]] = []
    for slab in slabs:
        keys, members = units_of_cover(slab, unit)
        owner = block[members[:, 0]]
        alone = (block[members] == owner[:, None]).all(1)
        whole = alone & are_whole_blocks(members, block, sizes)
        itself = (members == keys[:, None]).all(1)
        torn.append(keys[~whole & ~itself])
        for key, name in zip(keys[whole], owner[whole], strict=True):
            if head[name] < 0:
                head[name] = key
            elif head[name] != key:
                links.append((np.array([head[name]]), np.array([key])))
    if links:
        merged = connected_components(count, links)
        unit[:] = merged[unit]
        head = np.where(head >= 0, merged[np.maximum(head, 0)], -1)
    return head, [t for t in torn if len(t)]
