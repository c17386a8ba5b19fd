"""Arrays in temporary files that are mapped into memory: the kernel moves them to the disk where memory gets short.

The files have no name, so nothing is left of them when the process ends, however it does. Each holds many arrays: a
process may have open, and map, only so many files. The room of an array is used again when it is gone.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from snpc.types import AnyArray

SPILL_ALIGNMENT = 64  # bytes
FIRST_FILE, LARGEST_FILE = 16 << 20, 1 << 30  # bytes; a file is as large as those before it together
ZEROS = bytes(1 << 20)


@dataclass
class SpillFile:
    """One file. ``free``: (offset, length) of what no array takes, in order."""

    buffer: mmap.mmap
    free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, length: int) -> int | None:
        """The offset of ``length`` free bytes; None where there are not so many in one piece."""
        for index, (offset, size) in enumerate(self.free):
            if size >= length:
                self.free[index : index + 1] = [(offset + length, size - length)] if size > length else []
                return offset
        return None

    def give_back(self, offset: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for begin, size in sorted([*self.free, (offset, length)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = merged[-1][0], merged[-1][1] + size
            else:
                merged.append((begin, size))
        self.free = merged


class SpillFiles:
    """Files for the arrays of one owner, in the system's folder for temporary files (TMPDIR)."""

    def __init__(self) -> None:
        self.opened: list[SpillFile] = []
        self.gone: deque[tuple[SpillFile, int, int]] = deque()  # arrays may end at any time, amid a search for room too

    def keep(self, array: AnyArray) -> AnyArray:
        """A copy of the array in a file; the array itself where it holds objects. Raises OSError where there is no
        room."""
        if array.dtype.hasobject:
            return array
        length = -(-max(array.nbytes, 1) // SPILL_ALIGNMENT) * SPILL_ALIGNMENT
        file, offset = self.room_for(length)
        # not a view of another array: views of it then refer to it, and it is gone no sooner than they are
        kept: AnyArray = np.ndarray(array.shape, array.dtype, file.buffer, offset)
        kept[...] = array
        weakref.finalize(kept, self.gone.append, (file, offset, length))
        return kept

    def room_for(self, length: int) -> tuple[SpillFile, int]:
        while self.gone:
            file, offset, size = self.gone.popleft()
            file.give_back(offset, size)
        for file in self.opened:
            found = file.take(length)
            if found is not None:
                return file, found
        size = min(max(FIRST_FILE, sum(len(s.buffer) for s in self.opened)), LARGEST_FILE)
        file = open_spill_file(max(size, length))
        self.opened.append(file)
        found = file.take(length)
        assert found is not None
        return file, found


def open_spill_file(size: int) -> SpillFile:
    with tempfile.TemporaryFile(prefix="snpc-") as file:
        reserve(file, size)
        return SpillFile(mmap.mmap(file.fileno(), size), [(0, size)])  # which keeps the file


def reserve(file: IO[bytes], size: int) -> None:
    """Make the file so large that the disk has all of it: on a full disk a write into its mapping ends the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # this file system does not know how
                raise
    for chunk in chunks_of_zeros(size):
        file.write(chunk)
    file.flush()


def chunks_of_zeros(size: int) -> Iterator[bytes]:
    for begin in range(0, size, len(ZEROS)):
        yield ZEROS[: size - begin]
