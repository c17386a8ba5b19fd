"""benchmarks/gpu.sh and gpu.py: what they say without a GPU, and that every step still runs, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import process_environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**process_environment(), **variables}
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment, check=False)


def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'No devices were found'\n")
    command.chmod(0o755)
    done = run("bash", BENCHMARKS / "gpu.sh", tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and done.stderr.startswith("benchmarks/gpu.sh: no NVIDIA GPU is at hand")
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_without_a_gpu_it_is_refused_in_words(tmp_path: Path) -> None:
    done = run(sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "finds no NVIDIA GPU; --cpu tries the script" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_steps_stop_when_the_time_is_over(tmp_path: Path) -> None:
    done = run(sys.executable, BENCHMARKS / "gpu.py", "--cpu", "--seconds", 0, "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert done.returncode == 1 and {row["why"] for row in rows} == {"no time was left"}
    assert (
        "| whole prune | no time was left | no time was left |  |"
        in (tmp_path / "results").with_suffix(".md").read_text()
    )


@pytest.mark.slow
@pytest.mark.torch
def test_every_step_runs(tmp_path: Path) -> None:
    done = run(sys.executable, BENCHMARKS / "gpu.py", "--cpu", "--seconds", 2000, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["name"], row["device"]): row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert all(rows[name, device]["seconds"] > 0 for name in ("plain passes", "statistics", "whole prune")
               for device in ("cpu", "cuda"))  # fmt: skip
    assert all(rows[f"latency, {engine}", "cuda"]["pruned_ms"] > 0 for engine in ("onnxruntime", "torch"))
    assert rows["whole prune", "cuda"]["macs"] == pytest.approx(0.6, abs=0.02)
    assert (tmp_path / "results").with_suffix(".md").read_text().startswith("# No GPU: a smoke run")
