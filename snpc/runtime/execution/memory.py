"""How much memory may be used: what a user writes, what is free, and arrays kept within it or in temporary files."""

from __future__ import annotations

import contextlib
import ctypes
import re
import tempfile
import weakref

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph.shapes import weight_bytes
from snpc.runtime.execution.machine import free_memory
from snpc.types import AnyArray, Model

BYTE_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

GIB = 1 << 30


def parse_bytes(text: str) -> int:
    """``"2GB"``, ``"1.5 GiB"``, ``"500M"``, ``"1000000"`` -> bytes; GB is 10^9, GiB is 2^30. UserError: no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = int(float(found[1]) * BYTE_UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise UserError(f"{text!r} is no size in bytes: write it as 2GB, 512MiB or 1000000000")
    return size


def release_free_memory() -> None:
    """Hand back to the system what was freed. The C library keeps it otherwise, in pieces, after a large session more
    than a gigabyte; where it knows no such call (not glibc), nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_budget(limit: int | None) -> int:
    """``limit``, or where there is none half of what is free."""
    return free_memory() // 2 if limit is None else limit


class SpillableStore:
    """Keeps arrays: up to ``limit`` bytes of them in memory, what is more in temporary memory-mapped files.

    The files lie where the system keeps temporaries (TMPDIR) and are gone when their arrays are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes_in_memory = 0
        self.bytes_in_files = 0

    def keep(self, array: AnyArray) -> AnyArray:
        """The array, or a copy of it in a file."""
        if self.bytes_in_memory + array.nbytes > self.limit and array.nbytes:
            self.bytes_in_files += array.nbytes
            return spill_to_file(array)
        self.bytes_in_memory += array.nbytes
        weakref.finalize(array, self.release, array.nbytes)
        return array

    def release(self, count: int) -> None:
        self.bytes_in_memory -= count


def spill_to_file(array: AnyArray) -> AnyArray:
    with tempfile.TemporaryFile(prefix="snpc-") as file:
        try:
            np.ascontiguousarray(array).tofile(file)  # a mapped write would not survive a full disk
            file.flush()
            mapped: AnyArray = np.memmap(file, array.dtype, "r+", shape=array.shape or (1,))
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: no room for {array.nbytes / 1e6:.0f} MB that --memory-limit keeps out of "
                f"memory ({error.strerror or error}): set TMPDIR, or raise --memory-limit"
            ) from None
    return mapped.reshape(array.shape)


def session_bytes(model: Model) -> int:
    """What a session of ``model`` on the CPU takes: its weights, and those of half precision once more as floats (the
    CPU has no arithmetic for them)."""
    held = [v.const_value for v in model.graph.graph.initializers.values() if v.const_value is not None]
    weights = {id(tensor): tensor for tensor in held}.values()
    return sum(weight_bytes(t) * (3 if t.dtype in HALF_TYPES else 1) for t in weights)


def too_large_reason(model: Model) -> str:
    """In words, why the model cannot be run here; "" where it can."""
    needed, free = session_bytes(model), free_memory()
    if needed <= free // 2:  # the masked original is run as well, and others use the machine
        return ""
    return f"running the model takes about {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free"
