"""Arrays in temporary files: what they hold stays as long as anything refers to it, and their room is used again."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from snpc.runtime.io import spill_files
from snpc.runtime.io.spill_files import SpillFiles


def test_arrays_keep_their_values_while_others_come_and_go() -> None:
    """Random lifetimes: room that is used again was nobody's."""
    rng = np.random.default_rng(0)
    files, held = SpillFiles(), dict[int, tuple[np.ndarray, np.ndarray]]()
    for number in range(600):
        array = rng.integers(0, 255, int(rng.integers(1, 50_000)), dtype=np.uint8)
        kept = files.keep(array)
        assert kept.ctypes.data % 64 == 0
        part = kept.reshape(1, -1)[:, rng.integers(0, len(array)) :]  # a view of a view is all that stays
        held[number] = (part, array[-part.shape[1] :].copy())
        del kept, part
        for other in rng.choice(list(held), size=min(len(held), 2)):
            if rng.random() < 0.6:
                held.pop(int(other), None)
        for view, expected in held.values():
            np.testing.assert_array_equal(view[0], expected)


def test_room_is_used_again() -> None:
    files = SpillFiles()
    for _ in range(100):
        files.keep(np.zeros(1 << 20))  # 8 MB
        gc.collect()
    assert len(files.opened) == 1
    files.room_for(64)
    (file,) = files.opened
    assert sum(size for _, size in file.free) == len(file.buffer) - 64 and len(file.free) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files by /proc")
def test_many_arrays_take_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 1024 of them by default; a data set has more batches."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, files = len(list(Path("/proc/self/fd").iterdir())), SpillFiles()
    arrays = [files.keep(np.full(1000, number)) for number in range(5000)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 4
    assert all((array == number).all() for number, array in enumerate(arrays))
    assert not list(tmp_path.iterdir())  # they have no name


@pytest.mark.parametrize("system", ["with fallocate", "without"])
def test_the_disk_has_all_of_a_file(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a write into the mapping would end the process where the disk is full."""
    if system == "without":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("has none")
    path = tmp_path / "file"
    with path.open("w+b") as file:
        spill_files.reserve(file, 3_000_001)
    assert path.stat().st_size == 3_000_001
    if sys.platform == "linux":
        assert path.stat().st_blocks * 512 >= 3_000_001
