"""Lines in a pipe: few, plain, and none for what is quick."""

from __future__ import annotations

import pytest

from snpc.cli.progress.displays import LineDisplay, RunState, duration_text
from snpc.cli.progress.run_progress import RunProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_stages(durations: dict[str, float], tick: float = 0.5) -> RunProgress:
    """Every stage in parts of ``tick`` seconds. The display is shown after each, as the thread does."""
    clock = Clock()
    progress = RunProgress(LineDisplay(), clock)
    progress.closed.set()  # no thread
    for name, seconds in durations.items():
        parts = round(seconds / tick)
        with progress.stage(name, parts) as advance:
            for _ in range(parts):
                clock.now += tick
                advance(1)
                progress.closed.clear()
                progress.show()
                progress.closed.set()
    return progress


def test_quick_stages_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run_stages({"statistics": 1.5, "order": 1.0, "trials": 1.5})
    assert capsys.readouterr().err == ""


def test_a_long_stage_prints_a_line_at_first_then_every_few_seconds_and_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_stages({"statistics": 10.0, "order": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "snpc: statistics: 20 % in 2 s, 0:08 left",
        "snpc: statistics: 70 % in 7 s, 0:03 left",
        "snpc: statistics: took 10.0 s",
    ]


def test_many_quick_stages_print_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    run_stages({f"stage {k}": 1.0 for k in range(11)})
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_stage_in_one_piece_has_no_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    LineDisplay().show(RunState("writing", None, 6.0, None, 10.0))
    assert capsys.readouterr().err == "snpc: writing: 6 s\n"


def test_durations() -> None:
    assert [duration_text(s) for s in (0.2, 59.6, 61, 3600 + 125)] == ["0:00", "1:00", "1:01", "1:02:05"]
