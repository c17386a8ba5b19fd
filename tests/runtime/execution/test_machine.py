"""What snpc takes this machine for: as the system says it, and on systems that say less."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from snpc.runtime.execution import machine


def test_free_memory_is_within_the_machine() -> None:
    assert 10**6 < machine.free_memory() <= psutil.virtual_memory().total


def test_free_memory_is_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "container_free_bytes", lambda: 1234)
    assert machine.free_memory() == 1234
    monkeypatch.setattr(machine, "container_free_bytes", lambda: 1 << 62)
    assert machine.free_memory() < 1 << 62
    monkeypatch.setattr(machine, "container_free_bytes", lambda: -5)  # over its limit, for a moment
    assert machine.free_memory() == 0


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert machine.container_free_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.container_free_bytes(tmp_path) == 900
    assert machine.container_free_bytes(tmp_path / "none") is None


def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        assert machine.available_cores() == len(process.cpu_affinity())
    monkeypatch.setattr(psutil, "Process", SimpleNamespace)  # as on macOS, where a process is tied to no core
    assert machine.available_cores() == psutil.cpu_count()


def test_the_processor_by_its_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz: fast\nflags\t\t: fpu avx\nmodel name\t: other\n")
    assert machine.cpu_name(info) == "Some CPU @ 2 GHz: fast"
    assert machine.cpu_name(tmp_path / "none") == machine.cpu_name(tmp_path / "nothing")  # what Python calls it


@pytest.mark.parametrize(
    ("features", "width"),
    [
        ("fpu avx avx2 avx512f", 16),
        ("fpu avx avx2", 8),
        ("fpu", 4),
        ("", 4),
        ("x86_v2 x86_v3 x86_v4", 16),
        ("x86_v3", 8),
    ],
)
def test_floats_in_a_vector(features: str, width: int) -> None:
    assert machine.vector_width(features.split()) == width


def test_features_are_those_of_linux_and_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"SIMD Extensions": {"baseline": ["SSE3"], "found": ["AVX512F"]}}
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx\nflags\t\t: other\n")
    assert machine.cpu_features(info) == {"fpu", "avx", "sse3", "avx512f"}
    assert machine.cpu_features(tmp_path / "none") == {"sse3", "avx512f"}


@pytest.mark.skipif(not machine.CPU_INFO.is_file(), reason="needs /proc/cpuinfo")
def test_numpy_sees_the_vectors_that_linux_sees(tmp_path: Path) -> None:
    flags = next(iter(machine.cpu_info_values("flags", machine.CPU_INFO)), "").split()
    assert machine.vector_width(machine.cpu_features(tmp_path / "none")) == machine.vector_width(flags)
