"""Which tokens go when nobody names them: a target uses every axis that the model allows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import snpc
from snpc.pipeline import PlanRequest, apply_token_request, effective_token_request, token_request, token_schedule
from snpc.tokens import clamped_removals
from tests.command_line import CALIB, VIT, invoke, reported, write_tiny

MACS, LATENCY, PARAMS = (snpc.parse_target(text) for text in ("macs=0.4", "latency=0.4", "params=0.4"))


@pytest.fixture(scope="module")
def vit() -> snpc.Analysis:
    return snpc.analyze(snpc.load(VIT))


@pytest.fixture(scope="module")
def data(vit: snpc.Analysis) -> snpc.Calibration:
    return snpc.load_calibration(CALIB, vit.model.inputs, samples=16)


@pytest.mark.parametrize(
    ("tokens", "target", "with_data", "found"),
    [
        (None, MACS, True, "auto"),
        (None, LATENCY, True, "auto"),
        (None, PARAMS, True, None),  # fewer tokens leave the parameters as they are
        (None, None, True, None),
        (None, MACS, False, None),
        ("none", MACS, True, None),
        (" none ", None, False, None),
        ("auto", PARAMS, False, "auto"),  # asked for: refused later, with a reason
        ("merge:2", MACS, True, "merge:2"),
    ],
)
def test_what_is_asked_for(
    tokens: str | None,
    target: snpc.ResourceTarget | None,
    with_data: bool,
    found: str | None,
    vit: snpc.Analysis,
    data: snpc.Calibration,
) -> None:
    assert effective_token_request(tokens, vit, data if with_data else None, target) == found


def test_models_whose_tokens_stay_are_left_alone(tmp_path: Path) -> None:
    tiny = snpc.analyze(snpc.load(write_tiny(tmp_path / "tiny.onnx")))
    noise = snpc.random_calibration(tiny)
    assert effective_token_request(None, tiny, noise, MACS) is None
    assert apply_token_request(tiny, noise, None, target=MACS) is tiny


@pytest.mark.parametrize("flags", [(), ("--uniform",), ("--allocator", "dimap")], ids=["loss", "uniform", "dimap"])
@pytest.mark.slow
def test_a_target_uses_tokens_and_widths(flags: tuple[str, ...], tmp_path: Path) -> None:
    limited = ("--target", "macs=0.5", "--max-ratio", "0.3", "--calib", CALIB, "--calib-samples", 16)
    both = reported("prune", VIT, *limited, "-o", tmp_path / "out.onnx", *flags)
    assert both["tokens"]["steps"] and both["params"]["after"] < both["params"]["before"]
    assert both["macs"]["after"] <= 0.5 * both["macs"]["before"]
    refused = invoke("prune", VIT, *limited, *flags, "--tokens", "none", "-o", tmp_path / "out.onnx", code=2)
    assert "cannot be reached" in refused.stderr


@pytest.mark.parametrize(("token_drift", "reduced"), [(1e-9, True), (1e9, False)])
def test_tokens_go_only_where_they_pay(
    token_drift: float, reduced: bool, vit: snpc.Analysis, data: snpc.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_schedule.ScheduleEvaluator, "drift", lambda *_: token_drift)
    widths = PlanRequest(snpc.Budget(target=MACS), "select")
    found = apply_token_request(vit, data, None, target=MACS, widths=widths)
    assert (found.reduction is not None) == reduced


@pytest.mark.parametrize(
    ("narrow", "at_least"), [(0.9, 0.8), (0.6, 0.45), (0.0, 0.0)], ids=["at once", "deeper", "never"]
)
def test_widths_are_judged_where_they_change_the_outputs(
    narrow: float, at_least: float, vit: snpc.Analysis, data: snpc.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios of changes within rounding would say anything: the plan gets narrower until its change can be told."""

    def output_change(plan: snpc.PruningPlan) -> float:
        assert plan.budget is not None and plan.budget.target is not None
        return 1.5 if plan.budget.target.share <= narrow else 1 + 1e-9

    monkeypatch.setattr(token_schedule, "one_shot_pruned_model", lambda plan: plan)
    evaluator: Any = SimpleNamespace(output_change=output_change)
    wide = snpc.plan(vit, snpc.Budget(target="macs=0.9"), data, method="select", effort="quick")
    found, change = token_schedule.telling_plan(evaluator, wide, 1.0)
    assert found.budget is not None and found.budget.target is not None
    assert change == pytest.approx(0.5 if narrow else 0.0, abs=1e-6)
    assert at_least <= found.budget.target.share <= (narrow or 0.5)
    kept, all_kept = (sum(plan.slices.kept_width(g) for g in vit.groups) for plan in (found, wide))
    assert (found is wide) == (narrow == 0.9) and (kept < all_kept) == (narrow < 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(("time", "reduced"), [(0.5, True), (0.99, False)])
def test_a_latency_uses_tokens_that_save_time(
    time: float, reduced: bool, vit: snpc.Analysis, data: snpc.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_request, "time_pair", lambda *_: (10.0, time))
    for target in ("latency=0.6", "latency=6ms"):
        found = apply_token_request(vit, data, None, target=snpc.parse_target(target))
        assert (found.reduction is not None) == reduced
        if reduced:
            assert found.cost.macs - found.dead_macs <= 0.6 * found.cost.macs


def test_a_schedule_stands_alone(tmp_path: Path) -> None:
    report = reported("prune", VIT, "--tokens", "merge:2", "-o", tmp_path / "out.onnx")
    assert report["tokens"]["spec"] == "merge:2@1,2,3"
    assert report["params"]["after"] == report["params"]["before"]
    alone, uncut = (snpc.prune(VIT, tokens="merge:2", **amount).after for amount in ({}, {"ratio": 0.0}))
    assert (alone.macs, alone.params) == (uncut.macs, uncut.params)  # bytes: the options are written into the file


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "say how much goes: .*--tokens SCHEDULE"),
        (("--tokens", "none"), "say how much goes"),
        (("--tokens", "auto"), "say how much goes"),
        (("--tokens", "merge:2", "--criterion", "snp"), "no widths are cut: leave out --criterion"),
        (("--tokens", "merge:2", "--max-ratio", "0.5"), "no widths are cut: leave out --max-ratio"),
        (("--tokens", "auto", "--target", "params=0.5", "--calib", CALIB), "needs a target in MACs or of latency"),
    ],
)
def test_what_is_refused(flags: tuple[object, ...], said: str, tmp_path: Path) -> None:
    result = invoke("prune", VIT, *flags, "-o", tmp_path / "out.onnx", code=2)
    assert len(result.stderr.splitlines()) == 1
    assert re.search(said, result.stderr), result.stderr


def test_tokens_that_are_not_there_are_noted(vit: snpc.Analysis, tmp_path: Path) -> None:
    assert clamped_removals(vit, "merge:100") == {1: (100, 8), 2: (100, 4), 3: (100, 2)}
    assert clamped_removals(vit, "merge:2@1-3") == clamped_removals(vit, "topk:0.1") == {}
    clamped = invoke("prune", VIT, "--tokens", "merge:100", "-o", tmp_path / "out.onnx")
    assert "note: --tokens merge:100" in clamped.stderr and "8 after block 1" in clamped.stderr
    assert "note:" not in invoke("prune", VIT, "--tokens", "merge:2", "-o", tmp_path / "out.onnx").stderr
