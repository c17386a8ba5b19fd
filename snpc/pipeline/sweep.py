"""One model at several sizes: quality and speed of each, and which of them no other one beats."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.pipeline.planner import PruningPlan, plan, plan_without_cuts
from snpc.pipeline.search import apply
from snpc.pipeline.token_request import AUTO_TOKENS, apply_token_request
from snpc.pipeline.token_schedule import WidthRequest, macs_share, prepare_evaluator
from snpc.planning.config import Budget, is_latency_budget
from snpc.planning.plan import PruningMethod
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.accuracy import EvaluationData, collect_outputs, top1_accuracy
from snpc.runtime.evaluation.bench import bench
from snpc.runtime.evaluation.compare import aggregate, max_relative, measure_differences
from snpc.runtime.evaluation.latency import Workload
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.io.atomic import check_target
from snpc.targets.base import Precision
from snpc.targets.build import build, find_target, staging_folder, timed_artifact
from snpc.types import Cost

ORIGINAL_NAME = "original"
StepCallback = Callable[[str], None]


@dataclass(frozen=True)
class SweepPoint:
    """One size. ``macs`` and ``params`` are of the pruned ONNX file, the rest of the artefact where one was built.

    ``drift``: outputs against the original's, relative; ``agreement``: share of rows with the same top entry;
    ``top1_accuracy``: share of labels that are the top entry, where labels are given. ``speedup``: over the original,
    with
    its 95 % interval. ``tokens``: how they get fewer, "" where they do not. ``front``: nothing else is both at least as
    good and at least as fast.
    """

    name: str
    files: tuple[Path, ...]
    macs: int
    params: int
    bytes: int
    drift: float
    agreement: float | None
    accuracy: float | None
    tokens: str = ""
    latency: float = 0.0
    speedup: float = 1.0
    low: float = 1.0
    high: float = 1.0
    front: bool = False

    @property
    def quality(self) -> float:
        """Higher is better: accuracy where it is known, else the closer to the original the better."""
        return self.accuracy if self.accuracy is not None else -self.drift


@dataclass(frozen=True)
class SweepResult:
    """All points, the original first, then in the order of the targets. ``folder`` holds the models on the front."""

    model: Path
    folder: Path
    points: tuple[SweepPoint, ...]
    batch: int

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(p), "files": [f.name for f in p.files] if p.front else []} for p in self.points]
        return {"snpc_sweep": 1, "model": str(self.model), "batch": self.batch, "latency_unit": "ms", "points": rows}


def sweep(
    analysis: Analysis,
    targets: Sequence[str],
    folder: Path,
    calibration: Calibration,
    *,
    choice: Budget | None,
    tokens: str | None = None,
    evaluation: EvaluationData | None = None,
    method: PruningMethod | None = None,
    target: str | None = None,
    precision: Precision = "fp32",
    execution: Execution = DEFAULT_EXECUTION,
    batch: int = 1,
    rounds: int = 30,
    step: StepCallback = lambda text: None,
) -> SweepResult:
    """Prune to each of ``targets`` ("macs=0.8"), build these and the original for ``target`` if one is named, judge and
    time all of them in the same rounds, and keep in ``folder`` the models on the Pareto front.

    ``choice``: everything but the target (None: widths stay as they are). ``tokens``: how they get fewer
    (``runtime.token_request``), the same for all targets, or "auto": as is best for each. What is measured on
    ``calibration`` is measured once, or once for every number of tokens. ``step`` is told what comes next,
    ``steps(targets)`` times. Raises UserError for a target that cannot be reached, before anything is written.
    """
    if len(set(targets)) != len(targets) or not targets:
        raise UserError("--targets: give each target once, and at least one")
    check_target(folder / "sweep.json")
    wishes = [SweepTarget(text, replace(choice, target=text) if choice is not None else None) for text in targets]
    options: dict[str, Any] = {
        "precision": precision,
        "execution": execution,
        "calibration": calibration,
        "batch": batch,
    }
    made_as = timed_artifact(target, **options) if target else None
    workload = Workload(batch=batch, artifact=made_as) if any(w.is_latency for w in wishes) else None
    judge = evaluation or EvaluationData(calibration)
    step("measuring")
    means = SweepInputs(calibration, method, execution, workload)
    decisions = plan_targets(analysis, wishes, tokens, means)
    with staging_folder(folder / "sweep") as work:
        source = analysis.model.path

        def point(name: str, path: Path, cost: Cost, tokens: str = "") -> SweepPoint:
            out = work / path.with_suffix(find_target(target).suffix).name if target else None
            files = build(path, target, out, **options).files if target else (path,)
            total = sum(file.stat().st_size for file in files)
            return SweepPoint(name, files, cost.macs, cost.params, total, 0.0, None, None, tokens)

        points = [point(ORIGINAL_NAME, source, analysis.cost)]
        for text, (decision, fed) in decisions.items():
            step(text)
            path = work / "work" / f"{source.stem}-{re.sub('[^0-9a-z.]+', '-', text)}.onnx"
            made = apply(decision, path, calibration=fed, execution=execution)
            reduction = decision.slices.analysis.reduction
            points.append(point(text, path, made.after, reduction.spec if reduction is not None else ""))
        step("judging and timing")
        points = with_timings(with_quality(points, source, judge, execution), execution, batch, rounds)
        points = mark_pareto_front(points)
        return SweepResult(source, folder, tuple(move_front_files(points, source, folder)), batch)


@dataclass(frozen=True)
class SweepTarget:
    """One target, and the widths to cut for it (None: none)."""

    target: str
    budget: Budget | None

    @property
    def is_latency(self) -> bool:
        return self.budget is not None and is_latency_budget(self.budget)


@dataclass(frozen=True)
class SweepInputs:
    """What is measured, and how."""

    calibration: Calibration
    method: PruningMethod | None
    execution: Execution
    workload: Workload | None


PlanAndData = tuple[PruningPlan, Calibration]


def plan_targets(
    analysis: Analysis, wishes: Sequence[SweepTarget], tokens: str | None, means: SweepInputs
) -> dict[str, PlanAndData]:
    """For each target a decision, and the data that it is carried out with."""
    if tokens is not None and tokens.strip() == AUTO_TOKENS:
        return plan_each_target(analysis, wishes, means)
    if wishes[0].budget is None:
        raise UserError("--roles none leaves nothing to sweep through but --tokens auto")
    reduced, fed = apply_token_request(analysis, means.calibration, tokens, execution=means.execution)
    assert fed is not None
    return {text: (decision, fed) for text, decision in plan_from_one_measurement(reduced, wishes, fed, means).items()}


def plan_from_one_measurement(
    analysis: Analysis, wishes: Sequence[SweepTarget], calibration: Calibration, means: SweepInputs
) -> dict[str, PruningPlan]:
    """Measured for one target (a latency if there is one), planned for each."""
    choices = {wish.target: wish.budget for wish in wishes if wish.budget is not None}
    first = max(choices.values(), key=is_latency_budget)
    made = plan(
        analysis,
        first,
        calibration=calibration,
        method=means.method,
        execution=means.execution,
        workload=means.workload,
        whole=True,
    )
    return {text: made.for_budget(choice) for text, choice in choices.items()}


def plan_each_target(analysis: Analysis, wishes: Sequence[SweepTarget], means: SweepInputs) -> dict[str, PlanAndData]:
    """As many tokens as are best for each target; what was tried for one serves the next."""
    for wish in wishes:
        macs_share(wish.target)
    trials, found = prepare_evaluator(analysis, means.calibration, means.execution), {}
    for wish in wishes:
        widths = WidthRequest(wish.budget, means.method) if wish.budget is not None else None
        reduced, fed = apply_token_request(
            analysis,
            means.calibration,
            AUTO_TOKENS,
            target=wish.target,
            widths=widths,
            execution=means.execution,
            trials=trials,
        )
        assert fed is not None
        made = (
            plan_from_one_measurement(reduced, [wish], fed, means)[wish.target]
            if widths is not None
            else plan_without_cuts(reduced)
        )
        found[wish.target] = made, fed
    return found


def count_sweep_steps(targets: Sequence[str]) -> int:
    return len(targets) + 2


# -- judging ---------------------------------------------------------------------------------------------------------


def with_quality(
    points: Sequence[SweepPoint], source: Path, judge: EvaluationData, execution: Execution
) -> list[SweepPoint]:
    dense = collect_outputs(source, judge, execution)
    found = []
    for point in points:
        mine = dense if point.files[0] == source else collect_outputs(point.files[0], judge, execution)
        moved = aggregate([measure_differences(a, b) for a, b in zip(dense, mine, strict=True)])
        found.append(
            replace(
                point,
                drift=max_relative(moved),
                agreement=moved[0].agreement,
                accuracy=top1_accuracy(mine, judge.labels),
            )
        )
    return found


def with_timings(points: Sequence[SweepPoint], execution: Execution, batch: int, rounds: int) -> list[SweepPoint]:
    result = bench([point.files[0] for point in points], execution=execution, batch=batch, iterations=rounds)
    found = [replace(points[0], latency=result.timings[0].median)]
    for point, timing, speedup in zip(points[1:], result.timings[1:], result.speedups, strict=True):
        found.append(replace(point, latency=timing.median, speedup=speedup.ratio, low=speedup.low, high=speedup.high))
    return found


def mark_pareto_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Marked: points that no other is at least as good and as fast as, and better in one of the two."""

    def beats(a: SweepPoint, b: SweepPoint) -> bool:
        pair = (a.quality - b.quality, a.speedup - b.speedup)
        return min(pair) >= 0 and max(pair) > 0

    return [replace(p, front=not any(beats(other, p) for other in points)) for p in points]


def move_front_files(points: Sequence[SweepPoint], source: Path, folder: Path) -> list[SweepPoint]:
    """Move the files of the front into ``folder``; those of the others go with the temporary folder, and so does what
    was built of the original."""
    found = []
    for point in points:
        if point.name == ORIGINAL_NAME:
            point = replace(point, files=(source,))
        elif point.front:
            moved = [Path(shutil.move(file, folder / file.name)) for file in reversed(point.files)]
            point = replace(point, files=tuple(reversed(moved)))
        found.append(point)
    return found
