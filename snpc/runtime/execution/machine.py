"""What is known of this machine: cores, the processor's name and vector registers, free memory."""

from __future__ import annotations

import platform
from collections.abc import Collection
from pathlib import Path

import numpy as np
import psutil

CPU_INFO = Path("/proc/cpuinfo")
# float32 numbers per vector, by a feature under the name that Linux or numpy has for it (x86_v4: numpy from 2.4)
VECTOR_WIDTHS = (({"avx512f", "x86_v4"}, 16), ({"avx", "x86_v3"}, 8))
SMALLEST_VECTOR = 4  # 128 bits, as on Arm


def available_cores() -> int:
    """Logical cores that this process may run on."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 0


def cpu_name(info: Path = CPU_INFO) -> str:
    """The processor's name as Linux knows it, else as Python does (often only the architecture)."""
    names = cpu_info_values("model name", info)
    return next(iter(names), "") or platform.processor() or platform.machine()


def cpu_features(info: Path = CPU_INFO) -> frozenset[str]:
    """Instruction sets of this processor in lower case: those that Linux names, and those that numpy finds itself."""
    flags = next(iter(cpu_info_values("flags", info)), "")
    extensions = np.show_config(mode="dicts")["SIMD Extensions"]
    names = [*flags.split(), *extensions.get("baseline", []), *extensions.get("found", [])]
    return frozenset(name.lower() for name in names)


def vector_width(features: Collection[str] | None = None) -> int:
    """float32 numbers in one vector of a processor with these ``features`` (default: this one)."""
    present = set(cpu_features() if features is None else features)
    return next((width for names, width in VECTOR_WIDTHS if names & present), SMALLEST_VECTOR)


def cpu_info_values(key: str, info: Path) -> list[str]:
    """All values of ``key`` in a file like /proc/cpuinfo; none where there is no such file."""
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    pairs = [line.partition(":") for line in lines]
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def free_memory() -> int:
    """Bytes that can be had without swapping: the machine's, or what is left to this process's container."""
    container = container_free_bytes()
    machine: int = psutil.virtual_memory().available
    return max(machine if container is None else min(machine, container), 0)


def container_free_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left below the limit of this process's control group, which psutil does not know; None: no limit."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used
    except (OSError, ValueError):  # "max", or another system
        return None
