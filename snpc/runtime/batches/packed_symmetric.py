"""Symmetric matrices packed without their lower half: strips of rows, each from its diagonal on, concatenated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from snpc.types import FloatArray

STRIP_ROWS = 512  # fewer rows save more arithmetic, but make slower matrix products


def row_strips(size: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of each strip."""
    return ((start, min(start + STRIP_ROWS, size)) for start in range(0, size, STRIP_ROWS))


def packed_length(size: int) -> int:
    """Number of packed entries of a [size, size] matrix."""
    return sum((stop - start) * (size - start) for start, stop in row_strips(size))


def unpacked_size(length: int) -> int | None:
    """Number of rows of the matrix that has so many packed entries; None where there is no such matrix."""
    size = bisect_left(range(length + 1), length, key=packed_length)
    return size if packed_length(size) == length else None


def unpack_symmetric(packed: FloatArray) -> FloatArray:
    """[size, size] from its packed entries, of their type."""
    size = unpacked_size(len(packed))
    assert size is not None, len(packed)
    whole = np.empty((size, size), packed.dtype)
    at = 0
    for start, stop in row_strips(size):
        count = (stop - start) * (size - start)
        strip = packed[at : at + count].reshape(stop - start, size - start)
        whole[start:stop, start:] = strip
        whole[stop:, start:stop] = strip[:, stop - start :].T
        at += count
    return whole
