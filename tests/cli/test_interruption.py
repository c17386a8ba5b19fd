"""Signals: nothing is left, the exit code says which one, and two runs to one output do not meet."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import command, process_environment, write_tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")

# A verification that takes long: the file is staged, and nothing has its name yet.
SLOW = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # processes in the background ignore it
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "import snpc.pipeline.candidate as candidate\n"
    "def verify(*_, **__):\n"
    "    print('verifying', flush=True)\n"
    "    time.sleep(60)\n"
    "candidate.verify_candidate = verify\n"
    "from snpc.cli import main\n"
    "main(sys.argv[1:])\n"
)


def slow_prune(model: Path, output: Path, temporary: Path) -> subprocess.Popen[str]:
    """A prune that waits where it would verify."""
    words = [sys.executable, "-c", SLOW, "prune", str(model), "--ratio", "0.5", "-o", str(output)]
    environment = {**process_environment(), "TMPDIR": str(temporary)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "verifying\n", process.communicate()[1]
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    model, output, temporary = write_tiny(tmp_path / "m.onnx"), tmp_path / "out.onnx", tmp_path / "tmp"
    temporary.mkdir()
    output.write_bytes(b"an earlier model")
    process = slow_prune(model, output, temporary)
    assert len(list(tmp_path.iterdir())) == 4  # model, earlier output, folder, and the staged model
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "snpc: interrupted, nothing written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "tmp"]
    assert output.read_bytes() == b"an earlier model"
    assert list(temporary.glob("snpc-*")) == []


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """nohup starts a process that ignores SIGHUP."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from snpc.cli.interruption import interruptible\n"
        "with interruptible():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('still here')\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=process_environment(), check=False)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr


def test_two_runs_to_one_output_each_publish_their_own(tmp_path: Path) -> None:
    """While one verifies, another one writes, verifies and publishes: both files are verified ones."""
    model, output, temporary = write_tiny(tmp_path / "m.onnx"), tmp_path / "out.onnx", tmp_path / "tmp"
    temporary.mkdir()
    slow = slow_prune(model, output, temporary)
    other = command("prune", model, "--ratio", "0.25", "-o", output)
    assert other.returncode == 0, other.stderr
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    alone = command("prune", model, "--ratio", "0.25", "-o", tmp_path / "alone.onnx")
    assert alone.returncode == 0
    assert digest == hashlib.sha256((tmp_path / "alone.onnx").read_bytes()).hexdigest()
    slow.kill()
    slow.communicate()
    assert hashlib.sha256(output.read_bytes()).hexdigest() == digest
