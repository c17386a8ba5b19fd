"""What is announced of a run is what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import snpc
from snpc.pipeline import PlanRequest, SweepRequest, completion_stages, effort_costs, plain_pass_seconds, sweep
from snpc.planning import PruningMethod, parse_target
from snpc.runtime.execution import StageCost, announce
from snpc.runtime.sensitivity import joint_search, plan_trials
from snpc.runtime.sensitivity.joint_search import search_samples
from snpc.runtime.sensitivity.plan_trials import PlanTrials
from tests.command_line import CALIB, VIT, invoke
from tests.patching import patch
from tests.recorded_progress import RecordedProgress

LEAST_STAGES = {"statistics", "order", "verification, original", "verification, pruned", "verification, masked"}


def check_announced(progress: RecordedProgress, expected: list[StageCost]) -> None:
    """Everything that was announced happened, in that order; each stage reached its total."""
    names = [name for name, _ in expected]
    begun = [name for name in progress.begun if name in names]
    assert begun == names
    assert all(cost > 0 for _, cost in expected)
    assert all(progress.complete(name) for name in names)
    assert progress.open == []


def load_data() -> snpc.Calibration:
    return snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32, batch=8)


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"target": "macs=0.8", "tokens": "none"}, {"trials", "layers"}),
        ({"ratio": 0.3, "uniform": True, "method": "parallel"}, set()),
        ({"target": "macs=0.8", "tokens": "auto"}, {"token methods", "token schedules", "trials", "layers"}),
    ],
)
def test_a_prune_goes_through_the_announced_stages(options: dict[str, Any], extra: set[str], tmp_path: Path) -> None:
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    snpc.prune(VIT, tmp_path / "out.onnx", calibration=load_data(), execution=execution, **options)
    assert {name for name, _ in progress.expected} >= LEAST_STAGES | extra
    check_announced(progress, progress.expected)


@pytest.mark.parametrize(("method", "fitted"), [(None, ["layers"]), ("auto", ["layers"]), ("select", [])])
def test_tokens_alone_announce_the_fit_that_makes_up_for_them(
    method: PruningMethod | None, fitted: list[str], tmp_path: Path
) -> None:
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    options: dict[str, Any] = {"tokens": "merge:2@1", "method": method, "calibration": load_data()}
    snpc.prune(VIT, tmp_path / "out.onnx", execution=execution, **options)
    names = [name for name, _ in progress.expected]
    assert names == [*fitted, "verification, original", "verification, pruned", "verification, masked"]
    check_announced(progress, progress.expected)
    assert ("layers" in progress.begun) == bool(fitted)


@pytest.mark.parametrize("given", [("--tokens", "auto"), ()])
def test_the_command_announces_tokens_alone_too(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without widths, tokens are what reaches a target, said or not."""
    told: list[list[StageCost]] = []
    patch(monkeypatch, "snpc.cli.commands.prune.announce", lambda progress, stages: told.append(stages))
    invoke(
        "prune", VIT, "-o", tmp_path / "out.onnx", "--target", "macs=0.8", "--roles", "none", *given, "--calib", CALIB
    )
    (stages,) = told
    assert {"token methods", "token schedules", "layers"} <= {name for name, _ in stages}


def test_a_search_is_announced_as_a_whole(tmp_path: Path) -> None:
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    snpc.prune(VIT, tmp_path / "out.onnx", calibration=load_data(), execution=execution, max_drift=0.05)
    assert [name for name, _ in progress.expected] == ["statistics", "order", "trials", "search"]
    check_announced(progress, progress.expected)


def test_a_sweep_announces_every_target(tmp_path: Path) -> None:
    progress = RecordedProgress()
    analysis, targets = snpc.analyze(snpc.load(VIT)), [parse_target("macs=0.7"), parse_target("macs=0.5")]
    request = SweepRequest(snpc.Budget(target=targets[0], uniform=True), tokens="none", rounds=2)
    sweep(analysis, targets, tmp_path, load_data(), request, execution=snpc.Execution(progress=progress))
    names = [name for name, _ in progress.expected]
    assert names.count("layers") == names.count("verification, pruned") == 2
    assert names.count("statistics") == names.count("verification, original") == 1
    check_announced(progress, progress.expected)


def test_a_verification_that_refits_is_announced(tmp_path: Path) -> None:
    data, path = load_data(), tmp_path / "out.onnx"
    plan = snpc.plan(snpc.analyze(snpc.load(VIT)), snpc.Budget(ratio=0.3, uniform=True), data)
    snpc.apply(plan, path)
    progress = RecordedProgress()
    execution = snpc.Execution(progress=progress)
    expected = completion_stages(plan.slices, data)
    announce(execution.progress, expected)
    completed = snpc.complete_plan(plan.slices, data, execution=execution)
    snpc.verify(VIT, path, plan=completed, calibration=data, execution=execution)
    check_announced(progress, expected)


def test_nothing_is_foreseen_without_data(tmp_path: Path) -> None:
    progress = RecordedProgress()
    snpc.prune(VIT, tmp_path / "out.onnx", ratio=0.3, execution=snpc.Execution(progress=progress))
    assert progress.expected == []
    assert progress.complete("verification, pruned")


def test_efforts_cost_more_in_their_order_and_refused_ones_are_left_out() -> None:
    analysis, data = snpc.analyze(snpc.load(VIT)), load_data()
    costs = effort_costs(analysis, data, PlanRequest(snpc.Budget(target="macs=0.7")), "none")
    assert list(costs) == ["quick", "normal", "search"]
    assert costs["quick"] < costs["normal"] < costs["search"]
    assert list(effort_costs(analysis, data, PlanRequest(snpc.Budget(ratio=0.5)))) == ["quick", "normal"]
    assert list(effort_costs(analysis, data, PlanRequest(snpc.Budget(max_drift=0.1)))) == ["normal"]
    planned = effort_costs(analysis, data, PlanRequest(snpc.Budget(target="macs=0.7")), "none", writes=False)
    assert all(planned[effort] < costs[effort] for effort in costs)


def test_a_search_runs_as_many_samples_as_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a third: which part of the model a trial runs is an average over models."""
    run: list[float] = []
    opened = joint_search.open_plan_trials

    @contextmanager
    def watched(*arguments: Any) -> Iterator[PlanTrials]:
        with opened(*arguments) as trials:
            yield trials
            run.append(trials.samples + plan_trials.TRIAL_SAMPLES)

    monkeypatch.setattr(joint_search, "open_plan_trials", watched)
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=64, batch=8)
    plan = snpc.plan(analysis, snpc.Budget(target="macs=0.7"), data, effort="search")
    assert run == [pytest.approx(search_samples(len(plan.groups)), rel=0.33)]


def test_a_plain_pass_is_timed_where_the_model_runs(tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    few, many = (
        snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=samples, batch=8, held_out=0)
        for samples in (8, 128)
    )
    seconds = [plain_pass_seconds(analysis, data) for data in (few, many)]
    assert seconds[0] is not None and seconds[1] is not None and 0 < seconds[0] < seconds[1]
