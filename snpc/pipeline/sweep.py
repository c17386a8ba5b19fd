"""Sweeps: one model pruned to several targets, the quality and speed of each, and the Pareto front."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.pipeline.apply import apply
from snpc.pipeline.planner import PlanRequest, PruningPlan, make_plan, plan
from snpc.pipeline.stage_costs import sweep_stages
from snpc.pipeline.token_request import ALL_TOKENS, AUTO_TOKENS, apply_token_request, effective_token_request
from snpc.pipeline.token_schedule import check_token_target, prepare_evaluator
from snpc.pipeline.verify import Reference, candidate_reference, verification_data
from snpc.planning import Budget, Effort, PruningMethod, ResourceTarget
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import (
    EvaluationData,
    OutputMetrics,
    TimedArtifact,
    TimingProtocol,
    Workload,
    batch_differences,
    bench,
    evaluate,
    max_drift,
)
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, RandomInputs, announce
from snpc.runtime.io import check_target, file_bytes, publish_files, staging_folder
from snpc.types import LAYER_ROLE, Cost, Difference, Quality

ORIGINAL_NAME = "original"


@dataclass(frozen=True)
class SweepPoint:
    """One model. ``macs`` and ``params`` are of the ONNX file, the rest of what was built of it, if anything.

    ``drift``: relative RMS change of the outputs. ``agreement``: share of rows with the same top entry. ``accuracy``:
    score on the labels, the share that is the top entry or as asked for; None without labels. ``perplexity``: of a
    language model. ``speedup``: over the original, the median over rounds of the ratio of their times, with its 95 %
    interval from ``low`` to ``high``. ``latency``: ms, the original's median divided by ``speedup``. ``bytes``: of the
    files that are timed. ``tokens``: the token reduction, "" for none. ``front``: is it on the Pareto front?
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
    perplexity: float | None = None

    def judged_by(self, differences: Sequence[Difference]) -> SweepPoint:
        """The point with its quality, from what its outputs are beside the original's."""
        agreement = differences[0].agreement if differences else None
        found = next((d.perplexity.after for d in differences if d.perplexity is not None), None)
        return replace(self, drift=max_drift(differences), agreement=agreement, perplexity=found)

    @property
    def quality(self) -> float:
        """Higher is better: accuracy where it is known, else perplexity, else the closer to the original the better."""
        if self.accuracy is not None:
            return self.accuracy
        return -self.perplexity if self.perplexity is not None else -self.drift


@dataclass(frozen=True)
class SweepResult:
    """All points, the original first, then in the order of the targets. ``folder`` holds the models on the front.
    ``metric``: of the accuracy of the points, where there were labels."""

    model: Path
    folder: Path
    points: tuple[SweepPoint, ...]
    batch: int
    metric: str = "top1"

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(p), "files": [f.name for f in p.files] if p.front else []} for p in self.points]
        return {
            "snpc_sweep": 1,
            "model": str(self.model),
            "batch": self.batch,
            "latency_unit": "ms",
            "metric": self.metric,
            "points": rows,
        }


@dataclass(frozen=True)
class SweepBuilder:
    """What every model is built into before it is judged and timed.

    ``build(model, output)`` writes files, the one to run first; ``suffix`` is that of ``output``. ``artifact``:
    the same for latency targets, which are met by timing what is built.
    """

    suffix: str
    build: Callable[[Path, Path], tuple[Path, ...]]
    artifact: TimedArtifact


@dataclass(frozen=True)
class SweepRequest:
    """How every target is planned and judged.

    ``budget``: all but the target; None: no width is cut. ``tokens``: how tokens are reduced, the same for all targets;
    "auto": chosen for each; None: that for each target for which it is the default (``effective_token_request``).
    ``evaluation``: the data to judge by; None: the calibration data. ``batch``, ``rounds``: of the timing.
    """

    budget: Budget | None
    tokens: str | None = None
    method: PruningMethod | None = None
    evaluation: EvaluationData | None = None
    batch: int = 1
    rounds: int = 30
    effort: Effort = "normal"


def sweep(
    analysis: Analysis,
    targets: Sequence[ResourceTarget],
    folder: Path,
    calibration: Calibration,
    request: SweepRequest,
    *,
    builder: SweepBuilder | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> SweepResult:
    """Prune to each of ``targets``, build these models and the original (``builder`` None: the ONNX files themselves),
    judge and time all of them in the same rounds, and keep in ``folder`` the models on the Pareto front.

    Statistics are measured once, or once for every number of tokens. The original is run once for all of them, and
    without a ``builder`` and ``SweepRequest.evaluation`` the models are judged by what verification found. Raises
    UserError for a target that cannot be reached, before anything is written.
    """
    if len(set(targets)) != len(targets) or not targets:
        raise UserError("--targets: give each target once, and at least one")
    check_target(folder / "sweep.json")
    if request.budget is not None and LAYER_ROLE in request.budget.roles:
        raise UserError("a sweep cuts widths and tokens: leave out the role layer, or prune to each target")
    plans = plan_targets(analysis, targets, calibration, request, builder, execution)
    with staging_folder(folder / "sweep") as staging:
        (staging / "work").mkdir()
        source = analysis.model.path

        def point(name: str, path: Path, cost: Cost, quality: Quality | None = None, tokens: str = "") -> SweepPoint:
            files: tuple[Path, ...] = (path,)
            if builder is not None:
                files = builder.build(path, staging / path.with_suffix(builder.suffix).name)
            size = sum(file_bytes(file) if file.suffix == ".onnx" else file.stat().st_size for file in files)
            found = SweepPoint(name, files, cost.macs, cost.params, size, 0.0, None, None, tokens)
            return found if quality is None else found.judged_by(quality.differences)

        points = [point(ORIGINAL_NAME, source, analysis.cost)]
        reference = shared_reference(list(plans.values()))
        for target, pruning_plan in plans.items():
            path = staging / "work" / f"{source.stem}-{re.sub('[^0-9a-z.]+', '-', str(target))}.onnx"
            pruned = apply(pruning_plan, path, reference=reference_for(pruning_plan, reference))
            reduction = pruning_plan.analysis.reduction
            tokens = reduction.spec if reduction is not None else ""
            points.append(point(str(target), path, pruned.after, pruned.quality, tokens))
        if builder is not None or request.evaluation is not None or reference.not_run:
            evaluation = request.evaluation or EvaluationData(calibration.held_out or calibration)
            points = with_quality(points, analysis, evaluation, reference.metrics, execution)
        elif points[-1].agreement is not None:
            language = reference.metrics.language
            perplexity = language.dense.perplexity if language is not None else None
            points[0] = replace(points[0], agreement=1.0, perplexity=perplexity)
        points = with_timings(points, request, analysis.given_sizes, execution)
        points = mark_pareto_front(points)
        metric = request.evaluation.metric.name if request.evaluation is not None else "top1"
        return SweepResult(source, folder, tuple(move_front_files(points, source, folder)), request.batch, metric)


def plan_targets(
    analysis: Analysis,
    targets: Sequence[ResourceTarget],
    calibration: Calibration,
    request: SweepRequest,
    builder: SweepBuilder | None,
    execution: Execution,
) -> dict[ResourceTarget, PruningPlan]:
    """A plan for each target, in their order."""
    # A latency table is measured only for a latency.
    artifact = builder.artifact if builder is not None else None
    workload = Workload(batch=request.batch, artifact=artifact)
    kinds = {t: effective_token_request(request.tokens, analysis, calibration, t) for t in targets}
    requests = [
        PlanRequest(replace(request.budget, target=target), request.method, effort=request.effort)
        if request.budget is not None
        else None
        for target in targets
    ]
    tokens = [kinds[target] for target in targets]
    announce(execution.progress, sweep_stages(analysis, calibration, requests, tokens, request.method))
    chosen, others = ([t for t in targets if (kinds[t] == AUTO_TOKENS) is auto] for auto in (True, False))
    if others and request.budget is None:
        raise UserError("--roles none leaves nothing to sweep through but --tokens auto, for targets in MACs")
    plans = plan_each_target(analysis, chosen, calibration, request, workload, execution) if chosen else {}
    if others:
        plans |= plan_by_one_measurement(analysis, others, calibration, request, workload, execution)
    return {target: plans[target] for target in targets}


def plan_by_one_measurement(
    analysis: Analysis,
    targets: Sequence[ResourceTarget],
    calibration: Calibration,
    request: SweepRequest,
    workload: Workload,
    execution: Execution,
) -> dict[ResourceTarget, PruningPlan]:
    """A plan for each target, with the same number of tokens."""
    assert request.budget is not None
    analysis = apply_token_request(analysis, calibration, request.tokens or ALL_TOKENS, execution=execution)
    # Where there is a latency, it is planned first, since its table is part of the measurement.
    first = max(targets, key=lambda target: target.kind == "latency")
    budgets = {target: replace(request.budget, target=target) for target in targets}
    timed = workload if first.kind == "latency" else None
    measured = make_plan(
        analysis,
        PlanRequest(budgets[first], request.method, workload=timed, full_curves=True, effort=request.effort),
        calibration,
        execution=execution,
    )
    return {target: measured.for_budget(budget) for target, budget in budgets.items()}


def plan_each_target(
    analysis: Analysis,
    targets: Sequence[ResourceTarget],
    calibration: Calibration,
    request: SweepRequest,
    workload: Workload,
    execution: Execution,
) -> dict[ResourceTarget, PruningPlan]:
    """A plan for each target with the number of tokens that is best for it; what was tried for one serves the next."""
    for target in targets:
        check_token_target(target)
    evaluator = prepare_evaluator(analysis, calibration, execution)
    plans = {}
    for target in targets:
        budget = replace(request.budget, target=target) if request.budget is not None else None
        timed = workload if target.kind == "latency" else None
        widths = None
        if budget is not None:
            widths = PlanRequest(budget, request.method, workload=timed, full_curves=True, effort=request.effort)
        reduced = apply_token_request(
            analysis,
            calibration,
            AUTO_TOKENS,
            target=target,
            widths=widths,
            execution=execution,
            evaluator=evaluator,
        )
        if widths is None:
            plans[target] = plan(reduced, None, calibration, execution=execution)
        else:
            plans[target] = make_plan(reduced, widths, calibration, execution=execution)
    return plans


# -- judging ---------------------------------------------------------------------------------------------------------


def shared_reference(plans: Sequence[PruningPlan]) -> Reference:
    """What the original makes of the samples to verify on, for all plans. A plan that keeps all tokens says most: the
    original is run at other sizes as well."""
    return candidate_reference(min(plans, key=lambda plan: plan.analysis.reduction is not None))


def reference_for(plan: PruningPlan, reference: Reference) -> Reference:
    """The reference of another plan of the same model and data; the decisions of its tokens are its own."""
    if plan.analysis.reduction is None:
        return reference
    data = verification_data(plan.analysis, plan.calibration).first(len(reference.data.batches))
    data = replace(data, source=reference.data.source, held_out=reference.data.held_out)
    return replace(reference, data=data, probe=None)


def with_quality(
    points: Sequence[SweepPoint],
    analysis: Analysis,
    evaluation: EvaluationData,
    metrics: OutputMetrics,
    execution: Execution,
) -> list[SweepPoint]:
    """The points as ``evaluation`` judges them. ``metrics``: how the original's outputs were judged before, if they
    were."""
    source, head = analysis.model.path, metrics.language.head if metrics.language is not None else None
    dense = evaluate(source, evaluation, execution, head)
    judged = []
    for point in points:
        found = dense
        if point.files[0] != source:
            found = evaluate(point.files[0], evaluation, execution, head, len(dense.outputs))
        point = point.judged_by(batch_differences(dense.outputs, found.outputs, OutputMetrics.of(analysis)))
        perplexity = found.surprise.perplexity if head is not None else None
        judged.append(
            replace(point, accuracy=found.score.value if found.score is not None else None, perplexity=perplexity)
        )
    return judged


def with_timings(
    points: Sequence[SweepPoint], request: SweepRequest, sizes: Mapping[str, int], execution: Execution
) -> list[SweepPoint]:
    result = bench(
        [point.files[0] for point in points],
        RandomInputs(batch=request.batch, dim_sizes=sizes),
        protocol=TimingProtocol(iterations=request.rounds),
        execution=execution,
    )
    dense = result.timings[0].median
    timed = [replace(points[0], latency=dense)]
    for point, speedup in zip(points[1:], result.speedups, strict=True):
        latency = dense / speedup.ratio
        timed.append(replace(point, latency=latency, speedup=speedup.ratio, low=speedup.low, high=speedup.high))
    return timed


def mark_pareto_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points with ``front`` set where no other is at least as good and as fast, and better in one of the two.

    Only a point that is faster than the original beyond the noise of the timing counts: its interval lies above 1.
    """

    def beats(a: SweepPoint, b: SweepPoint) -> bool:
        pair = (a.quality - b.quality, a.speedup - b.speedup)
        return min(pair) >= 0 and max(pair) > 0

    faster = [p for p in points if p.name == ORIGINAL_NAME or p.low > 1]
    return [replace(p, front=p in faster and not any(beats(other, p) for other in faster)) for p in points]


def move_front_files(points: Sequence[SweepPoint], source: Path, folder: Path) -> list[SweepPoint]:
    """Move the files of the front into ``folder``. Those of other points, and what was built of the original, are
    deleted with the staging folder."""
    placed = []
    for point in points:
        if point.name == ORIGINAL_NAME:
            point = replace(point, files=(source,))
        elif point.front:
            point = replace(point, files=publish_files(point.files, folder / point.files[0].name))
        placed.append(point)
    return placed
