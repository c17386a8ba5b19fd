"""What goes with units of several groups is counted once: predictions are compared with the costs of written files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.pipeline.score import score_groups
from snpc.planning.allocate import allocation_path
from snpc.planning.config import Budget, ResourceTarget, TargetKind, parse_target
from snpc.planning.plan import SlicePlan, select_units
from snpc.planning.savings import saved_at
from snpc.types import Role
from tests.command_line import CALIB, VIT, invoke, reported
from tests.models.operators import Case, build
from tests.oracle import analysis_at

CHAIN = Case(
    """<ir_version: 10, opset_import: ["": 17]>
    g (float[B, 3, 9, 9] x) => (float[B, 5, 9, 9] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)  ra = Relu(a)
        b = Conv <pads = [1, 1, 1, 1]> (ra, wb, bb)  rb = Relu(b)
        c = Conv <pads = [1, 1, 1, 1]> (rb, wc, bc)  rc = Relu(c)
        y = Conv(rc, wd)
    }""",
    {"wa": (24, 3, 3, 3), "ba": (24,), "wb": (32, 24, 3, 3), "bb": (32,), "wc": (24, 32, 3, 3), "bc": (24,),
     "wd": (5, 24, 1, 1)},
    {("conv", 1, 24): 2, ("conv", 1, 32): 1},
    {"x": (2, 3, 9, 9)},
)  # fmt: skip


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> snpc.UnitScores:
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    analysis = analysis_at(path, build(CHAIN))
    return score_groups(analysis, "magnitude", analysis.groups, None)


def test_a_chain_of_convolutions_saves_what_was_predicted(scores: snpc.UnitScores, tmp_path: Path) -> None:
    analysis, rng = scores.analysis, np.random.default_rng(0)
    for turn in range(3):
        widths = {g.id: int(rng.integers(1, g.size)) for g in analysis.groups}
        plan: SlicePlan = select_units(scores, Budget(0.5, ("conv",)), widths)
        after = snpc.analyze(snpc.load(snpc.apply(snpc.PruningPlan(plan), tmp_path / f"{turn}.onnx").path)).cost
        for kind in ("macs", "params", "bytes"):
            saved = saved_at(widths, scores, analysis.groups, ResourceTarget(kind, 0.5))
            assert saved == pytest.approx(getattr(analysis.cost, kind) - getattr(after, kind), abs=1.0), kind


def test_heads_and_channels_of_the_same_layers_save_what_was_predicted(tmp_path: Path) -> None:
    """Channels go of the heads that stay."""
    analysis, rng = snpc.analyze(snpc.load(VIT)), np.random.default_rng(0)
    scores = score_groups(analysis, "magnitude", analysis.groups, None)
    roles: tuple[Role, ...] = ("qk", "vo", "head")
    groups = [g for g in analysis.groups if g.role in roles]
    for turn in range(3):
        widths = {g.id: int(rng.integers(1, g.size)) for g in groups}
        assert any(widths[g.id] < g.size for g in groups if g.role == "head")
        plan = select_units(scores, Budget(0.5, roles), widths)
        after = snpc.analyze(snpc.load(snpc.apply(snpc.PruningPlan(plan), tmp_path / f"{turn}.onnx").path)).cost
        kinds: tuple[TargetKind, ...] = ("macs", "params")
        for kind in kinds:
            gone = analysis.saved_before(kind) + saved_at(widths, scores, groups, ResourceTarget(kind, 0.5))
            assert gone == pytest.approx(getattr(analysis.cost, kind) - getattr(after, kind), rel=1e-3), kind


def test_a_target_of_heads_and_widths_is_met(tmp_path: Path) -> None:
    data = ("--calib", CALIB, "--calib-samples", 32, "--tokens", "none")
    for kind in ("macs", "params"):
        report = reported("prune", VIT, "--roles", "all,head", "--target", f"{kind}=0.4", *data, "-o", tmp_path / kind)
        assert 0.38 * report[kind]["before"] < report[kind]["after"] <= 0.4 * report[kind]["before"]


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_a_target_is_met_and_no_more(kind: TargetKind, scores: snpc.UnitScores) -> None:
    analysis, budget = scores.analysis, Budget(target=parse_target(f"{kind}=0.45"), roles=("conv",))
    assert budget.target is not None
    path, saved = allocation_path(analysis.groups, scores, budget)
    for step in range(len(path.steps) + 1):
        assert saved[step] == pytest.approx(saved_at(path.widths_after(step), scores, analysis.groups, budget.target))
    plan = snpc.make_slice_plan(scores, budget)
    kept = {g.id: plan.kept_width(g) for g in analysis.groups}
    left = 1 - saved_at(kept, scores, analysis.groups, budget.target) / getattr(analysis.cost, kind)
    assert 0.40 < left <= 0.45


def test_a_target_that_is_missed_is_said(tmp_path: Path) -> None:
    """Of the file's bytes some are no weights, and these are what the target is met with."""
    target = tmp_path / "cut.onnx"
    result = invoke("prune", VIT, "--target", "bytes=0.3", "-o", target, "--json", tmp_path / "report.json")
    share = target.stat().st_size / VIT.stat().st_size
    assert share > 0.3
    assert f"bytes=0.3 is missed: {share:.3f}" in " ".join(result.stderr.split())
    met = invoke("prune", VIT, "--target", "macs=0.6", "-o", target)
    assert "is missed" not in met.stderr + met.stdout
