"""Fewer tokens, whole layers and widths in one budget: what goes is said, written and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import snpc
from snpc.errors import UserError
from snpc.passes import remove_sublayers
from snpc.pipeline import effective_token_request
from snpc.planning import parse_target
from snpc.tokens import reduce_tokens
from tests.command_line import CALIB, VIT, invoke, reported
from tests.models.idle import IDLE, write_idle

DATA = ("--calib", CALIB, "--calib-samples", 32, "--calib-batch", 32)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idle(tmp_path_factory.mktemp("idle") / "idle.onnx")


@pytest.mark.parametrize("tokens", ["merge:2@1", "topk:0.8@1"])
def test_tokens_layers_and_widths_share_a_target(tokens: str, idle: Path, tmp_path: Path) -> None:
    plan, cut, applied = (tmp_path / name for name in ("plan.json", "cut.onnx", "applied.onnx"))
    report = reported("prune", idle, "--roles", "all,layer", "--tokens", tokens, "--target", "macs=0.5", "--effort",
                      "quick", *DATA, "--plan", plan, "-o", cut)  # fmt: skip
    assert [entry["name"] for entry in report["layers"]] == [IDLE]
    assert report["tokens"]["spec"] == json.loads(plan.read_text())["tokens"]
    assert 0.48 < report["macs"]["after"] / report["macs"]["before"] <= 0.5
    checks = " ".join(report["verify"]["structure"])
    assert "same tokens taken out in place" in checks and "1 layer that is gone equals it replaced in place" in checks
    assert json.loads(plan.read_text())["groups"]
    invoke("apply", idle, plan, *DATA, "-o", applied)
    assert applied.read_bytes() == cut.read_bytes()


def test_tokens_are_chosen_beside_widths_only() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    data, target = snpc.load_calibration(CALIB, analysis.model.inputs), parse_target("macs=0.5")
    assert effective_token_request(None, analysis, data, target, ("ffn", "layer")) == "auto"
    assert effective_token_request(None, analysis, data, target, ("layer",)) is None


def test_layers_by_which_tokens_go_stay() -> None:
    """Their attention, and sums within the merging that look like layers."""
    full = snpc.analyze(snpc.load(VIT))
    reduced = reduce_tokens(full, "merge:2@1+guided:3@3")
    reasons = {s.name: s.reason for s in reduced.sublayers}
    names = {s.name for s in full.sublayers}
    assert {name for name in names if not reasons[name]} == names - {"blocks.0.attn", "blocks.2.attn"}
    assert "decides which tokens go" in reasons["blocks.0.attn"]
    assert [reason for name, reason in reasons.items() if name not in names] == ["tokens get fewer inside it"]
    with pytest.raises(UserError, match="decides which tokens go"):
        remove_sublayers(reduced, ["blocks.2.attn"])


def test_costs_are_those_of_the_file(idle: Path, tmp_path: Path) -> None:
    """Deciding which tokens go costs MACs that a layer does not take along."""
    reduced = reduce_tokens(snpc.analyze(snpc.load(idle)), "merge:2@1")
    shorter = remove_sublayers(reduced, [IDLE, "blocks.2.mlp"])
    assert shorter.deciding_macs == reduced.deciding_macs > 0
    plan = snpc.SlicePlan(shorter, "none", {}, {})
    after = snpc.apply(snpc.PruningPlan(plan), tmp_path / "cut.onnx").after
    assert after.macs == shorter.cost.macs - shorter.dead_macs


@pytest.mark.slow
def test_layers_go_within_a_limit_of_quality(idle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snpc.pipeline.search.SEARCH_ROUNDS", 3)
    data = snpc.load_calibration(CALIB, snpc.load(idle).inputs, samples=32, batch=32)
    result = snpc.prune(
        idle, tmp_path / "cut.onnx", calibration=data, roles=("ffn", "layer"), max_drift=0.01, tokens="none"
    )
    removal, search = result.plan.analysis.removal, result.search
    assert removal is not None and IDLE in removal.names
    assert search is not None and search.kind == "drift" and len(search.tried) <= 3
    assert result.quality.drift == search.reached <= 0.01
    assert result.after.macs < 0.9 * result.before.macs
    assert result.plan.options["max_drift"] == 0.01 and "target" not in result.plan.options
