"""Calibration data as training data: shuffled, split, or sharded over processes.

Each function returns ``Calibration`` again, so everything is still streamed. Parts (files) are read one after the other
in random order, with their rows shuffled: a file of many samples is read once per epoch, and shuffled within itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration, RowSelection, pack_batches
from snpc.types import IntArray

SHUFFLE_STREAM, SPLIT_STREAM = 1, 2  # beside a seed, so that shuffling and splitting draw different numbers


def sample_ids(data: Calibration) -> list[IntArray]:
    """Per batch, [samples]: their positions in the whole source, from 0."""
    return [np.concatenate([rows.sample_ids for rows in batch]) for batch in data.batch_plan]


def shuffle_samples(data: Calibration, seed: Sequence[int], batch: int) -> Calibration:
    """In an order that ``seed`` decides, in batches of at most ``batch`` samples and of nearly equal sizes."""
    rng = np.random.default_rng((*seed, SHUFFLE_STREAM))
    parts = _rows_by_part(data)
    by_key: dict[Hashable, list[RowSelection]] = {}
    for k in rng.permutation(len(parts)):
        part: RowSelection = parts[k]
        by_key.setdefault(part.batch_key, []).append(replace(part, rows=rng.permutation(part.rows)))
    plan = [batch_rows for parts in by_key.values() for batch_rows in _equal_batches(data, parts, batch)]
    if len(by_key) > 1:
        plan = [plan[k] for k in rng.permutation(len(plan))]
    return _with_batches(data, plan)


def hold_out(data: Calibration, samples: int, seed: int) -> tuple[Calibration, Calibration]:
    """(all but ``samples`` samples, those samples), drawn by ``seed``. Raises UserError where one would be empty."""
    parts = _rows_by_part(data)
    total = sum(map(len, parts))
    held_out = np.zeros(total, bool)
    held_out[np.random.default_rng((seed, SPLIT_STREAM)).permutation(total)[:samples]] = True
    flags_by_part = np.split(held_out, np.cumsum([len(part) for part in parts])[:-1])
    size = data.sample_axes.batch_size
    halves = []
    for side in (False, True):
        selections = [replace(p, rows=p.rows[flags == side]) for p, flags in zip(parts, flags_by_part, strict=True)]
        plan = pack_batches([selection for selection in selections if len(selection)], data.batch)
        halves.append(_with_batches(data, [batch for batch in plan if not size or _count_rows(batch) == data.batch]))
    training, evaluation = halves
    if not (training.samples and evaluation.samples):
        raise UserError(f"{data.source}: {total} samples are too few to hold some of them out")
    return training, evaluation


def shard_batches(data: Calibration, rank: int, world_size: int) -> tuple[Calibration, list[float]]:
    """(the rows of every batch that process ``rank`` takes, the weight of each such batch in an average over
    processes). Batches with fewer samples than processes are left out."""
    plan, weights = [], []
    for batch in data.batch_plan:
        count = _count_rows(batch)
        if count < world_size:
            continue
        shard: list[RowSelection] = []
        start = 0
        for selection in batch:
            rows = selection.rows[(rank - start) % world_size :: world_size]
            start += len(selection)
            if len(rows):
                shard.append(replace(selection, rows=rows))
        plan.append(shard)
        weights.append(_count_rows(shard) * world_size / count)
    return _with_batches(data, plan), weights


def one_sample_batches(data: Calibration) -> Calibration:
    """In stored order, one sample per batch, or the batch size that the model fixes."""
    if data.unbatched:
        return data
    return _with_batches(data, pack_batches(_rows_by_part(data), data.sample_axes.batch_size or 1))


def skip_batches(data: Calibration, count: int) -> Calibration:
    """Without the first ``count`` batches."""
    return replace(data, batch_plan=data.batch_plan[count:])


def _rows_by_part(data: Calibration) -> list[RowSelection]:
    """One selection per part, of all its rows that are in use."""
    by_part: dict[int, list[RowSelection]] = {}
    for selection in (selection for batch in data.batch_plan for selection in batch):
        by_part.setdefault(id(selection.part), []).append(selection)
    return [replace(parts[0], rows=np.concatenate([p.rows for p in parts])) for parts in by_part.values()]


def _equal_batches(data: Calibration, parts: Sequence[RowSelection], batch: int) -> list[list[RowSelection]]:
    """Batches of nearly equal sizes up to ``batch``; where the model fixes its batch size, the full ones of that."""
    size = data.sample_axes.batch_size
    if size:
        return [rows for rows in pack_batches(parts, size) if _count_rows(rows) == size]
    total = _count_rows(parts)
    return pack_batches(parts, -(-total // -(-total // batch)))


def _count_rows(selections: Sequence[RowSelection]) -> int:
    return sum(map(len, selections))


def _with_batches(data: Calibration, plan: Sequence[Sequence[RowSelection]]) -> Calibration:
    size = data.sample_axes.batch_size or max(map(_count_rows, plan), default=data.batch)
    return replace(data, batch_plan=tuple(map(tuple, plan)), samples=sum(map(_count_rows, plan)), batch=size)
