"""Efforts of a plan: what each measures, what the plan records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import snpc
from snpc.errors import UserError
from snpc.planning.config import Budget, Effort
from tests.closed_forms import calibration_of
from tests.command_line import CALIB, VIT, reported
from tests.oracle import analysis_of, feeds_of

NAME = "vit_timm__ts17"
TARGET = Budget(target="params=0.8")


def test_quick_makes_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("quick measures no loss curves")

    monkeypatch.setattr("snpc.pipeline.planner.measure_loss_curves", refuse)
    analysis = analysis_of(NAME)
    data = calibration_of(analysis, feeds_of(NAME))
    plan = snpc.plan(analysis, TARGET, data, effort="quick")
    assert plan.slices.keep and plan.slices.method == "auto"
    with pytest.raises(AssertionError, match="quick measures no loss curves"):
        snpc.plan(analysis, TARGET, data)


@pytest.mark.parametrize("effort", ["quick", "normal"])
def test_the_effort_is_in_the_plan_and_its_file(effort: Effort, tmp_path: Path) -> None:
    analysis = analysis_of(NAME)
    plan = snpc.plan(analysis, TARGET, calibration_of(analysis, feeds_of(NAME)), effort=effort)
    snpc.save_plan(plan, tmp_path / "plan.json")
    assert plan.slices.options["effort"] == effort
    assert json.loads((tmp_path / "plan.json").read_text())["options"]["effort"] == effort
    narrower = plan.for_budget(Budget(target="params=0.7"))
    assert narrower.slices.options["effort"] == effort


def test_the_command_line_passes_the_effort_on() -> None:
    flags = ("--calib", CALIB, "--target", "macs=0.7", "--tokens", "none", "--dry-run")
    quick, normal = (reported("prune", VIT, *flags, "--effort", effort) for effort in ("quick", "normal"))
    assert (quick["options"]["effort"], normal["options"]["effort"]) == ("quick", "normal")


def test_efforts_that_cannot_serve_a_budget_are_refused() -> None:
    analysis = analysis_of(NAME)
    data = calibration_of(analysis, feeds_of(NAME))
    with pytest.raises(UserError, match="quick measures no loss curves"):
        snpc.plan(analysis, Budget(max_drift=0.1), data, effort="quick")
    for budget in (Budget(0.5), Budget(max_drift=0.1), Budget(target="macs=0.5", allocator="dimap")):
        with pytest.raises(UserError, match="search moves units between groups"):
            snpc.plan(analysis, budget, data, effort="search")
    with pytest.raises(UserError, match="'slow' is not one of quick, normal, search"):
        snpc.plan(analysis, TARGET, data, effort="slow")  # type: ignore[typeddict-item]
