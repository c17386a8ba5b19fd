"""How results are shown: two statements at the end, and a warning that is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snpc.cli.tables import print_verdict
from snpc.types import Difference, Quality, Verdict
from tests.command_line import CALIB, VIT, invoke

POOR = Quality(
    (Difference("logits", 9.0, 0.8, 0.6, 0.345, "kl", 1.9, 0.8),), 64, True, "64 held-out samples of calib", False
)
VERDICT = Verdict(("same inputs and outputs",), (Difference("logits", 1e-6, 4e-7, 1.0),), POOR, "16 samples", 1e-4)


def shown(verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_verdict(verdict)
    return capsys.readouterr().out.splitlines()


def test_a_correct_rewrite_is_not_called_good(capsys: pytest.CaptureFixture[str]) -> None:
    rewrite, quality, output, warning = shown(VERDICT, capsys)
    assert rewrite.startswith("rewrite: correct (sliced equals masked to 4.0e-07")
    assert quality == "quality: poor: outputs no longer resemble the original's"
    assert output.startswith("  logits: ") and warning.startswith("WARNING: ")
    assert "verified" not in " ".join((rewrite, quality, output, warning))


def test_many_caches_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    caches = tuple(Difference(f"present.{k}", 1.0, 0.2, 0.9, 1.0) for k in range(48))
    fine = replace(POOR.differences[0], distance=0.01)
    lines = shown(replace(VERDICT, quality=replace(POOR, differences=(fine, *caches))), capsys)
    assert len(lines) == 4 and "48 outputs" in lines[-1]


def test_what_was_not_run_is_not_called_correct(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = Quality((), 0, False, "nothing", False)
    lines = shown(replace(VERDICT, equals_mask=(), quality=nothing, not_run="too large"), capsys)
    assert "not run: too large" in lines[0] and "correct" not in lines[0]
    assert lines[1:] == ["quality: unknown: outputs were not compared"]


def test_a_result_ends_with_the_two_statements(tmp_path: Path) -> None:
    flags = ("--ratio", 0.9, "--method", "select", "--roles", "ffn", "--calib", CALIB, "--calib-samples", 16)
    lines = invoke("prune", VIT, *flags, "-o", tmp_path / "out.onnx").stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("rewrite: correct"))
    assert lines[start + 1].startswith("quality: ") and "64 held-out samples" in lines[start + 2]
    assert all(line.startswith("WARNING: ") for line in lines[start + 3 :])
