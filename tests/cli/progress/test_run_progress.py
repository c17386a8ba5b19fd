"""Progress of commands: lines in a pipe, one bar on a terminal, nothing with --quiet."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from snpc.cli.progress import run_progress
from snpc.cli.progress.displays import RunState
from snpc.cli.progress.run_progress import RunProgress
from snpc.runtime.execution import TIMING_STAGE
from tests.command_line import CALIB, VIT, process_environment

PRUNE = ("prune", VIT, "--target", "macs=0.7", "--tokens", "none", "--effort", "quick", "--calib", CALIB,
         "--calib-samples", 16)  # fmt: skip
SLOW_PASSES = """
import time
from snpc.cli import main
from snpc.cli.progress import displays, run_progress
from snpc.pipeline import planner
displays.FIRST_LINE, displays.LINE_INTERVAL, run_progress.REDRAW_INTERVAL = 0.2, 0.4, 0.05
measure = planner.measure_statistics
def measure_slowly(analysis, calibration, *rest, execution, **options):
    for _ in execution.track("slow pass", range(20), 20):
        time.sleep(0.05)
    return measure(analysis, calibration, *rest, execution=execution, **options)
planner.measure_statistics = measure_slowly
main()
"""


class States:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.shown: list[RunState] = []
        self.ended: list[str] = []
        self.cleared = 0

    def show(self, state: RunState) -> None:
        self.shown.append(state)

    def end_stage(self, state: RunState) -> None:
        self.ended.append(state.name)

    def clear(self) -> None:
        self.cleared += 1


def wait_for_redraw(display: States, name: str) -> None:
    deadline = time.monotonic() + 20
    while not any(state.name == name for state in display.shown):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_thread_shows_the_innermost_stage_until_the_progress_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "REDRAW_INTERVAL", 0.01)
    display = States()
    progress = RunProgress(display)
    with progress.stage("search", 2) as advance:
        wait_for_redraw(display, "search")
        with progress.stage("layers", 4):
            wait_for_redraw(display, "layers")
        advance(1)
        display.shown.clear()
        wait_for_redraw(display, "search")
    assert display.ended == ["layers", "search"] and display.cleared == 1
    thread = progress.thread
    progress.close()
    assert thread is not None
    thread.join(20)
    assert not thread.is_alive()


def test_nothing_is_drawn_between_the_rounds_of_a_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "REDRAW_INTERVAL", 0.005)
    display, main_thread, threads = States(), threading.get_ident(), set[int]()
    monkeypatch.setattr(display, "show", lambda state: threads.add(threading.get_ident()))
    progress = RunProgress(display)
    with progress.stage(TIMING_STAGE, 3) as advance:
        for _ in range(3):
            time.sleep(0.12)
            advance(1)
    progress.close()
    assert threads == {main_thread}


def test_advances_from_several_threads_add_up() -> None:
    progress = RunProgress(States())
    with progress.stage("pass", 4000) as advance:
        workers = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert progress.estimate.open[0].done == 4000
    progress.close()


def run_slowly(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command, one pass of which takes a second, with both streams in pipes."""
    words = [sys.executable, "-c", SLOW_PASSES, *map(str, arguments), "-o", str(folder / "out.onnx")]
    return subprocess.run(words, capture_output=True, text=True, env=process_environment(), check=True)


def test_a_pipe_gets_plain_lines_with_the_time_left(tmp_path: Path) -> None:
    result = run_slowly(tmp_path, *PRUNE, "--json", "-")
    assert json.loads(result.stdout)
    lines = [line for line in result.stderr.splitlines() if line.startswith("snpc: slow pass: ")]
    assert 3 <= len(lines) <= 5
    assert all(re.fullmatch(r"snpc: slow pass: \d+ % in \d+ s, \d+:\d\d left", line) for line in lines[:-1])
    assert re.match(r"snpc: slow pass: took \d+\.\d s", lines[-1])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stderr)


def test_quiet_prints_the_result_and_nothing_else(tmp_path: Path) -> None:
    result = run_slowly(tmp_path, *PRUNE, "-q")
    assert result.stderr == ""
    assert "MACs" in result.stdout


def test_quiet_keeps_errors(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "snpc.cli", "prune", str(tmp_path / "missing.onnx"), "--ratio", "0.5", "--quiet"]
    result = subprocess.run(words, capture_output=True, text=True, env=process_environment(), check=False)
    assert result.returncode == 2 and "missing.onnx" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_one_bar_which_is_gone_at_the_end(tmp_path: Path) -> None:
    import pty

    reader, terminal = pty.openpty()
    words = [sys.executable, "-c", SLOW_PASSES, *map(str, PRUNE), "-o", str(tmp_path / "out.onnx")]
    environment = {**process_environment(), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=terminal, stdin=terminal, env=environment) as process:
        os.close(terminal)
        drawn = b""
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            drawn += part
        assert process.stdout is not None and "MACs" in process.stdout.read().decode()
    os.close(reader)
    assert process.returncode == 0
    text = drawn.decode()
    bars = re.findall(r"slow pass \S.*? (\d+)%", text)
    assert len(bars) >= 3 and [int(b) for b in bars] == sorted(int(b) for b in bars)
    assert "left" in text
    shown = [line.rsplit("\x1b[2K", 1)[-1] for line in text.split("\n")]  # what an erased line leaves
    assert not any("slow pass" in line for line in shown if line.strip("\r").startswith("snpc: "))
    assert text.rstrip().endswith("out.onnx")  # the command that follows is the last line
