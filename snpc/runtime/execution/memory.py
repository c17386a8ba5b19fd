"""Memory limits: sizes as users write them, arrays kept within a limit or in files, and the memory a model needs."""

from __future__ import annotations

import contextlib
import ctypes
import re
import tempfile
import weakref
from collections.abc import Iterable

import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import weight_bytes
from snpc.runtime.execution.machine import free_memory
from snpc.runtime.io import SpillFiles
from snpc.types import AnyArray

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
MAX_BYTES = 1 << 60
HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

GIB = 1 << 30


def parse_bytes(text: str) -> int:
    """``"2GB"``, ``"1.5 GiB"``, ``"500M"``, ``"1000000"`` -> bytes; GB is 10^9, GiB is 2^30. UserError: no size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([KMGT]I?)?B?", text.strip().upper())
    size = float(match[1]) * BYTE_UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < MAX_BYTES:
        raise UserError(f"{text[:50]!r} is no size in bytes: write it as 2GB, 512MiB or 1000000000")
    return int(size)


def format_bytes(count: int) -> str:
    """``3400000`` -> ``"3.4 MB"``."""
    unit = next((unit for unit in ("G", "M") if count >= BYTE_UNITS[unit]), "K")
    return f"{count / BYTE_UNITS[unit]:.1f} {unit.replace('K', 'k')}B"


def release_free_memory() -> None:
    """Return freed memory to the system: glibc keeps it otherwise, more than a gigabyte after a large session. With
    other C libraries nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_budget(limit: int | None) -> int:
    """``limit`` in bytes; for None half of the free memory."""
    return free_memory() // 2 if limit is None else limit


class SpillableStore:
    """Keeps arrays: up to ``limit`` bytes in memory, the others in temporary memory-mapped files."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.files = SpillFiles()
        self.bytes_in_memory = 0
        self.bytes_in_files = 0

    def keep(self, array: AnyArray) -> AnyArray:
        """The array itself, or a copy of it in a file. Raises UserError where the files find no room."""
        if self.bytes_in_memory + array.nbytes > self.limit and array.nbytes:
            self.bytes_in_files += array.nbytes
            return self.spill(array)
        self.bytes_in_memory += array.nbytes
        weakref.finalize(array, self.release, array.nbytes)
        return array

    def spill(self, array: AnyArray) -> AnyArray:
        try:
            return self.files.keep(array)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: no room for {array.nbytes / 1e6:.0f} MB that --memory-limit keeps out of "
                f"memory ({error.strerror or error}): set TMPDIR, or raise --memory-limit"
            ) from None

    def release(self, count: int) -> None:
        self.bytes_in_memory -= count


def model_weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """The initializers of the main graph, one that several values share once."""
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    return list({id(tensor): tensor for tensor in tensors}.values())


def session_bytes(weights: Iterable[ir.TensorProtocol]) -> int:
    """Bytes that these weights take in a CPU session: as they are, and those of half precision once more as float32,
    in which the CPU computes."""
    return sum(weight_bytes(tensor) * (3 if tensor.dtype in HALF_TYPES else 1) for tensor in weights)


def weight_budget(limit: int | None) -> int:
    """Bytes that weights may take in a session: no more than half of the free memory, since others use the machine."""
    return min(memory_budget(limit), free_memory() // 2)


def too_large_reason(weights: Iterable[ir.TensorProtocol]) -> str:
    """Why these weights are too large to run on this machine, for a message; "" where they are not."""
    needed, free = session_bytes(weights), free_memory()
    if needed <= free // 2:
        return ""
    return f"running the model takes about {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free"
