"""The samples of calibration data in another order, split, or shared between processes: for training.

Each function gives ``Calibration`` again, so everything is still streamed: parts (files) are read one after the other
in random order, with their rows mixed. A file of many samples is thus read once per epoch, and mixed in itself only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.dataset import Calibration, RowSelection, pack_batches
from snpc.types import IntArray

SHUFFLE_STREAM, SPLIT_STREAM = (
    1,
    2,
)  # what else numbers are drawn for with a seed; it also says which samples of a source are taken


def sample_ids(data: Calibration) -> list[IntArray]:
    """Per batch, [samples]: their places in the whole source, from 0."""
    return [np.concatenate([piece.sample_ids for piece in pieces]) for pieces in data.batch_plan]


def shuffle_samples(data: Calibration, seed: Sequence[int], batch: int) -> Calibration:
    """In an order that ``seed`` decides, in batches of at most ``batch`` and nearly equal sizes."""
    rng = np.random.default_rng((*seed, SHUFFLE_STREAM))
    lines = _rows_by_part(data)
    kinds: dict[Hashable, list[RowSelection]] = {}
    for k in rng.permutation(len(lines)):
        mixed = replace(lines[k], rows=rng.permutation(lines[k].rows))
        kinds.setdefault(mixed.kind, []).append(mixed)
    plan = [pieces for alike in kinds.values() for pieces in _equal_batches(data, alike, batch)]
    if len(kinds) > 1:
        plan = [plan[k] for k in rng.permutation(len(plan))]
    return _with_batches(data, plan)


def hold_out(data: Calibration, held: int, seed: int) -> tuple[Calibration, Calibration]:
    """(all but ``held`` samples, those), drawn by ``seed``. Raises UserError where one of the two would be empty."""
    lines = _rows_by_part(data)
    total = sum(map(len, lines))
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng((seed, SPLIT_STREAM)).permutation(total)[:held]] = True
    parts = np.split(chosen, np.cumsum([len(line) for line in lines])[:-1])
    found = []
    for wanted in (False, True):
        kept = [replace(line, rows=line.rows[part == wanted]) for line, part in zip(lines, parts, strict=True)]
        plan = pack_batches([line for line in kept if len(line)], data.batch)
        found.append(
            _with_batches(
                data,
                [pieces for pieces in plan if not data.sample_axes.batch_size or _count_rows(pieces) == data.batch],
            )
        )
    if not all(part.samples for part in found):
        raise UserError(f"{data.source}: {total} samples are too few to hold some of them out")
    return found[0], found[1]


def shard_batches(data: Calibration, rank: int, world: int) -> tuple[Calibration, list[float]]:
    """What process ``rank`` of ``world`` takes of every batch, and what each of its batches counts in an average over
    processes. Batches with fewer samples than processes are left out."""
    plan, weights = [], []
    for pieces in data.batch_plan:
        count = _count_rows(pieces)
        if count < world:
            continue
        mine: list[RowSelection] = []
        start = 0
        for piece in pieces:
            rows = piece.rows[(rank - start) % world :: world]
            start += len(piece)
            if len(rows):
                mine.append(replace(piece, rows=rows))
        plan.append(mine)
        weights.append(_count_rows(mine) * world / count)
    return _with_batches(data, plan), weights


def one_sample_batches(data: Calibration) -> Calibration:
    """As they are stored, one sample per batch, or as few as the model takes."""
    if data.unbatched:
        return data
    return _with_batches(data, pack_batches(_rows_by_part(data), data.sample_axes.batch_size or 1))


def skip_batches(data: Calibration, first: int) -> Calibration:
    """Without the first ``first`` batches."""
    return replace(data, batch_plan=data.batch_plan[first:])


def _rows_by_part(data: Calibration) -> list[RowSelection]:
    """One piece per part, with all of its rows that are in use."""
    found: dict[int, list[RowSelection]] = {}
    for piece in (piece for pieces in data.batch_plan for piece in pieces):
        found.setdefault(id(piece.part), []).append(piece)
    return [replace(pieces[0], rows=np.concatenate([p.rows for p in pieces])) for pieces in found.values()]


def _equal_batches(data: Calibration, pieces: Sequence[RowSelection], batch: int) -> list[list[RowSelection]]:
    if data.sample_axes.batch_size:
        return [
            made
            for made in pack_batches(pieces, data.sample_axes.batch_size)
            if _count_rows(made) == data.sample_axes.batch_size
        ]
    total = _count_rows(pieces)
    return pack_batches(pieces, -(-total // -(-total // batch)))


def _count_rows(pieces: Sequence[RowSelection]) -> int:
    return sum(map(len, pieces))


def _with_batches(data: Calibration, plan: Sequence[Sequence[RowSelection]]) -> Calibration:
    size = data.sample_axes.batch_size or max(map(_count_rows, plan), default=data.batch)
    return replace(data, batch_plan=tuple(map(tuple, plan)), samples=sum(map(_count_rows, plan)), batch=size)
