"""Symmetric sums without their lower half: strips of rows, each from its diagonal on, one behind the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from snpc.types import FloatArray

STRIP_ROWS = 512  # rows; narrower ones save more arithmetic, but products of few rows are slow


def row_strips(size: int) -> Iterator[tuple[int, int]]:
    """First and last (not included) row of each."""
    return ((start, min(start + STRIP_ROWS, size)) for start in range(0, size, STRIP_ROWS))


def packed_length(size: int) -> int:
    """Entries that are kept of [size, size]."""
    return sum((stop - start) * (size - start) for start, stop in row_strips(size))


def unpacked_size(length: int) -> int | None:
    """Rows of the matrix of which so many entries are kept; None where there is no such matrix."""
    size = bisect_left(range(length + 1), length, key=packed_length)
    return size if packed_length(size) == length else None


def unpack_symmetric(packed: FloatArray) -> FloatArray:
    """[size, size] from its packed entries."""
    size = unpacked_size(len(packed))
    assert size is not None, len(packed)
    whole = np.empty((size, size))
    at = 0
    for start, stop in row_strips(size):
        count = (stop - start) * (size - start)
        strip = packed[at : at + count].reshape(stop - start, size - start)
        whole[start:stop, start:] = strip
        whole[stop:, start:stop] = strip[:, stop - start :].T
        at += count
    return whole
