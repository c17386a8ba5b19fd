"""Token schedules (--tokens auto): which method removes how many tokens where, for a target in MACs.

A schedule has the number of tokens that are removed after each block, at the length at which MACs are quoted; for
inputs of other lengths the same shares are removed. Schedules of the same cost are built and run on a few calibration
samples, and the one that changes the outputs least is taken. First the methods are compared, then the stretch of
blocks, where and in which form tokens come back if the outputs need all, the distribution over the stretch, and the
number of steps.

Where widths are cut too, several costs are tried. The one is taken at which the measured change by tokens and the
change that the loss curves predict for the widths are smallest together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import ShapeFacts, choose_dim_sizes
from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.passes.slicing import rewrite_model
from snpc.passes.token_analysis import TokenPoint
from snpc.pipeline.planner import PlanRequest, PruningPlan, check_request, make_plan
from snpc.planning import Budget, Effort, ResourceTarget, SlicePlan, UnitScores, cuts_of, make_slice_plan
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import fit_parallel, in_rotated_order, using_algebra
from snpc.runtime.evaluation import OutputMetrics, metrics_identity, run_batches
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.io import NOT_STORED, StoredStage, save
from snpc.runtime.sensitivity import UNUSABLE_CHANGE
from snpc.runtime.statistics import measure_token_relevance
from snpc.temporary import temporary_folder
from snpc.tokens import (
    TOKEN_METHODS,
    Energy,
    TokenAmount,
    TokenCost,
    TokenMethod,
    TokenReductionPlan,
    TokenRequest,
    TokenStep,
    Unmerge,
    UnmergeForm,
    analyze_with_steps,
    check_method,
    exit_blocks,
    externalize_decisions,
    reduction_obstacle,
    settings_for,
    steps_for,
    stream_dtype,
    token_cost,
)
from snpc.types import AnyArray, Feeds

SCHEDULE_SAMPLES = 32
SHARE_DIGITS = 3
WINDOW_STARTS, WINDOW_ENDS = (0.0, 0.1, 0.2, 0.35, 0.5), (1.0, 0.85, 0.7)  # shares of the depth between which tokens go
TAPER_RATIOS = (0.5, 2.0)  # tokens removed at the first block over those at the last one; tried after the even ones
STRIDES = (2, 3)
DRIFT_TIE_RATIO = 1.15  # drifts within this ratio count as equal on so few samples
# of what is to be saved: how much of it by tokens, where widths are cut too; nothing is tried beside these
TOKEN_SAVING_SHARES = (1.0, 0.85, 0.7, 0.5)
TELLING_SHARE = 0.05  # of the change by tokens: a smaller change by widths says nothing about that of narrower ones
NARROWER, NARROWEST = 0.8, 0.4  # narrower widths are tried by this factor, down to this share of the MACs

TokenSchedule = tuple[int, ...]
DepthProfile = tuple[float, ...]
Window = tuple[int, int]  # positions in WINDOW_STARTS and WINDOW_ENDS


@dataclass(frozen=True)
class TokenWay:
    """How tokens get fewer, whichever number at each block.

    ``back``: blocks at whose end all tokens are back, for outputs that need them; each point takes the next one that it
    can, and its last one behind these. ``form``: how they come back.
    """

    method: TokenMethod
    back: tuple[int, ...] = ()
    form: UnmergeForm = "delta"

    def unmerge_at(self, point: TokenPoint) -> Unmerge | None:
        blocks = [e.block for e in point.exits]
        block = next((b for b in self.back if b in blocks), blocks[-1] if blocks else 0)
        return Unmerge(block, self.form) if block else None

    def __str__(self) -> str:
        back = "".join(f"/{block}" for block in self.back)
        return f"{self.method.name}{back}{':copy' if self.form == 'copy' else ''}"


@dataclass
class ScheduleEvaluator:
    """Builds and runs reduced models, each once. ``dense``: the dense model's outputs for ``batches``, which are judged
    by ``metrics``."""

    analysis: Analysis
    facts: ShapeFacts
    dim_sizes: Mapping[str, int]
    cost: TokenCost
    batches: Sequence[Feeds]
    dense: Sequence[Mapping[str, AnyArray]]
    metrics: OutputMetrics
    execution: Execution
    offline: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    drifts: dict[tuple[str, TokenSchedule], float] = field(default_factory=dict)
    stage: StoredStage = NOT_STORED

    def drift(self, way: TokenWay, schedule: TokenSchedule) -> float:
        """Change of the outputs, like a squared error (``OutputMetrics.change``)."""
        key = (str(way), schedule)
        name = f"{way} {' '.join(map(str, schedule))}"
        stored = self.stage.get(name) if key not in self.drifts else None
        if stored is not None:
            self.drifts[key] = float(stored.record)
        if key not in self.drifts:
            steps = self.steps(way, schedule)
            reduction = TokenReductionPlan(
                tuple(steps), {s.point.value: stream_dtype(self.facts, s.point) for s in steps}
            )
            model = externalize_decisions(self.analysis.model.graph, self.facts, self.dim_sizes, steps)
            reduction.embed_decisions(model)
            self.drifts[key] = self.output_change(model)
            self.stage.put(name, self.drifts[key])
        return self.drifts[key]

    def output_change(self, model: ir.Model) -> float:
        """Change of the outputs by ``model``. The model is changed."""
        with temporary_folder() as folder:
            path = folder / "tried.onnx"
            save(finalize(model), path)
            moved = run_batches(path, self.batches, self.execution)
        return float(np.mean([self.metrics.change(a, b) for a, b in zip(self.dense, moved, strict=True)]))

    def request_for(self, way: TokenWay, schedule: TokenSchedule) -> TokenRequest:
        request: dict[int, tuple[TokenMethod, TokenAmount]] = {}
        count, back = self.cost.count, 0
        for point, removed in zip(self.analysis.tokens.points, schedule, strict=True):
            if 0 < back < point.block:
                count = self.cost.count
            others, unmerge = count - point.staying, way.unmerge_at(point)
            removed = max(0, min(removed, way.method.max_removed(others)))
            if point.fixed_length:
                request[point.block] = (way.method, TokenAmount(removed, unmerge=unmerge))
            elif removed:
                share = round((others - removed) / others, SHARE_DIGITS)
                request[point.block] = (way.method, TokenAmount(0, share, unmerge))
            count -= removed
            back = unmerge.block if unmerge is not None else 0
        return request

    def steps(self, way: TokenWay, schedule: TokenSchedule) -> list[TokenStep]:
        return steps_for(self.analysis, self.request_for(way, schedule), self.offline)

    def macs(self, way: TokenWay, schedule: TokenSchedule) -> float:
        request = self.request_for(way, schedule)
        settings = settings_for(self.analysis.tokens.points, request, count=self.cost.count)
        return self.cost.macs(settings, way.method, exit_blocks(request))

    def scale_to_macs(self, way: TokenWay, profile: Sequence[float], macs: float) -> TokenSchedule | None:
        """The smallest multiple of ``profile`` that needs at most ``macs``; None where none does."""
        low, high = 0.0, float(self.cost.count)

        def at(scale: float) -> TokenSchedule:
            behind = [round(scale * s) for s in np.concatenate([[0], np.cumsum(profile)])]
            return tuple(int(n) for n in np.diff(behind))

        if self.macs(way, at(high)) > macs:
            return None
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if self.macs(way, at(middle)) <= macs else (middle, high)
        return at(high)


def choose_token_schedule(
    analysis: Analysis,
    calibration: Calibration | None,
    target: ResourceTarget | None,
    widths: PlanRequest | None,
    execution: Execution = DEFAULT_EXECUTION,
    evaluator: ScheduleEvaluator | None = None,
) -> Analysis:
    """The analysis of the model with its tokens reduced to ``target``, or in part where ``widths`` are cut as well.

    ``evaluator``: schedules that were evaluated for other targets. Raises UserError where calibration data is missing
    or the target cannot be reached.
    """
    share = macs_share(target)
    if widths is not None:
        check_request(widths, calibration)
    if calibration is None:
        raise UserError(
            "--tokens auto compares schedules by the change of the outputs, which is measured: give --calib"
        )
    evaluator = evaluator or prepare_evaluator(analysis, calibration, execution)
    whole, budget = float(analysis.cost.macs), share * analysis.cost.macs
    least = whole - analysis.dead_macs
    if budget >= least:
        return analysis
    levels = [least - share * (least - budget) for share in (TOKEN_SAVING_SHARES if widths is not None else (1.0,))]
    best = least_drift_way(evaluator, levels[len(levels) // 2])
    if best is None and widths is None:
        raise UserError(f"target {target}: fewer tokens alone do not reach it; cut widths too, or ask for more")
    if best is None:
        return analysis
    best, reachable = schedules_at_levels(evaluator, best, levels)
    if not reachable:
        raise UserError(f"target {target}: fewer tokens alone do not reach it; cut widths too, or ask for more")
    if widths is None:
        return analyze_with_steps(analysis, evaluator.steps(best, reachable[0][1]))
    return split_with_widths(evaluator, best, reachable, calibration, widths, budget)


def macs_share(target: ResourceTarget | None) -> float:
    """R of "macs=R". Raises UserError for any other target."""
    check_token_target(target)
    assert target is not None and target.kind == "macs", "a latency comes as a share of the MACs"
    return target.share


def check_token_target(target: ResourceTarget | None) -> None:
    """Raises UserError for a target that fewer tokens cannot serve: they leave parameters and bytes as they are."""
    if target is None or target.kind not in ("macs", "latency"):
        raise UserError(
            "--tokens auto needs a target in MACs or of latency: give --target macs=R and --calib"
            + (f", not {target}" if target is not None else "")
        )


def prepare_evaluator(analysis: Analysis, calibration: Calibration, execution: Execution) -> ScheduleEvaluator:
    """An evaluator on the first calibration samples. Raises UserError where the tokens cannot be reduced."""
    if not analysis.tokens.points:
        raise UserError(f"{analysis.model.path.name}: its tokens cannot be reduced{reduction_obstacle(analysis)}")
    dim_sizes, facts = choose_dim_sizes(analysis.model.graph)
    batches: list[Feeds] = []
    for feeds in calibration.batches():
        batches.append(feeds)
        if len(batches) * calibration.batch >= SCHEDULE_SAMPLES:
            break
    dense = run_batches(analysis.model.path, batches, execution, "token schedules, original")
    metrics = OutputMetrics.of(analysis).for_values(dense[0])
    offline: Mapping[int, tuple[float, ...]] = {}
    with suppress(UserError):  # other methods work without it
        if has_fixed_token_count(analysis) and not any(point.exits for point in analysis.tokens.points):
            offline = measure_token_relevance(analysis.model.graph, analysis.tokens.points, batches, execution)
    stage = NOT_STORED
    if execution.work is not None:
        named = (analysis.identity, calibration.identity, metrics_identity(analysis))
        stage = execution.stored_stage("token schedules", *named)
    return ScheduleEvaluator(
        analysis,
        facts,
        dim_sizes,
        token_cost(analysis, facts),
        batches,
        dense,
        metrics,
        execution,
        offline,
        stage=stage,
    )


def has_fixed_token_count(analysis: Analysis) -> bool:
    """Do all inputs have the same number of tokens?"""
    return all(point.fixed_length for point in analysis.tokens.points)


def least_drift_way(evaluator: ScheduleEvaluator, macs: float) -> TokenWay | None:
    """The way that changes the outputs least when every block removes the same number of tokens."""
    drifts: list[tuple[float, str, TokenWay]] = []
    for method in evaluator.execution.track("token methods", TOKEN_METHODS.values(), len(TOKEN_METHODS)):
        way = TokenWay(method)
        if not can_try(evaluator, method):
            continue
        schedule = evaluator.scale_to_macs(way, [1.0] * len(evaluator.analysis.tokens.points), macs)
        if schedule is not None:
            drifts.append((evaluator.drift(way, schedule), method.name, way))
    return min(drifts)[2] if drifts else None


def can_try(evaluator: ScheduleEvaluator, method: TokenMethod) -> bool:
    """Is a method possible at every point, and one that suits the model? Energy is for models without a class token:
    others say by its attention which tokens matter."""
    points = evaluator.analysis.tokens.points
    if method.input_adaptive or (method.needs_offline and not evaluator.offline):
        return False
    if not (has_fixed_token_count(evaluator.analysis) or method.computes_count):
        return False
    if isinstance(method, Energy) and any(point.leading_reads for point in points):
        return False
    try:
        for point in points:
            check_method(evaluator.analysis, point.block, method)
    except UserError:
        return False
    return True


def window_profiles(count: int) -> dict[Window, DepthProfile]:
    """Stretches of blocks that remove the same number of tokens each."""
    spans = {
        (i, j): (round(start * count), round(end * count))
        for i, start in enumerate(WINDOW_STARTS)
        for j, end in enumerate(WINDOW_ENDS)
    }
    return {
        window: tuple(float(first <= k < last) for k in range(count))
        for window, (first, last) in spans.items()
        if first < last
    }


def tapered_profiles(profile: DepthProfile) -> list[DepthProfile]:
    """The stretch with more tokens removed at its first blocks than at its last ones, and the reverse."""
    inside = [k for k, share in enumerate(profile) if share]
    slopes = [np.geomspace(ratio, 1, len(inside)) for ratio in TAPER_RATIOS] if len(inside) > 1 else []
    return [tuple(float(slope[k - inside[0]]) if k in inside else 0.0 for k in range(len(profile))) for slope in slopes]


def strided_profiles(profile: DepthProfile) -> list[DepthProfile]:
    """Every second and every third block of the stretch: the same tokens in fewer steps."""
    inside = [k for k, share in enumerate(profile) if share]
    return [
        tuple(float(k in inside[::stride]) for k in range(len(profile))) for stride in STRIDES if len(inside) > stride
    ]


def best_window(
    evaluator: ScheduleEvaluator,
    way: TokenWay,
    macs: float,
    windows: Mapping[Window, DepthProfile],
    start: Window | None = None,
) -> Window | None:
    """The stretch of blocks that changes the outputs least at ``macs``; None where no stretch reaches that.

    With ``start``, the best one at a cost nearby: from there on, as long as a stretch with another start or end next
    to it is better.
    """

    @cache
    def drift_at(window: Window) -> float:
        schedule = evaluator.scale_to_macs(way, windows[window], macs)
        return evaluator.drift(way, schedule) if schedule is not None else float("inf")

    best, previous = start, None
    while best is not None and best != previous:
        best, previous = min([best, *neighbors(best, windows)], key=drift_at), best
    if best is None or drift_at(best) == float("inf"):
        best = min(evaluator.execution.track("token schedules, one cost", windows, len(windows)), key=drift_at)
    return best if drift_at(best) < float("inf") else None


def neighbors(window: Window, windows: Mapping[Window, DepthProfile]) -> list[Window]:
    """The stretches with the next start or end, earlier or later, or both."""
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return [shifted for i, j in shifts if (shifted := (window[0] + i, window[1] + j)) in windows]


def best_variant(
    evaluator: ScheduleEvaluator, way: TokenWay, macs: float, profile: DepthProfile
) -> TokenSchedule | None:
    """The schedule at ``macs`` that changes the outputs least, of the profile, more tokens removed early or late, and
    fewer steps. Of equal ones the one with the fewest steps, because each step takes time beside its MACs."""
    profiles = [profile, *tapered_profiles(profile), *strided_profiles(profile)]
    schedules = [evaluator.scale_to_macs(way, tried, macs) for tried in profiles]
    drifts = {schedule: evaluator.drift(way, schedule) for schedule in schedules if schedule is not None}
    if not drifts:
        return None
    near = [schedule for schedule in drifts if drifts[schedule] <= DRIFT_TIE_RATIO * min(drifts.values())]
    return min(near, key=lambda schedule: (sum(n > 0 for n in schedule), drifts[schedule]))


def schedules_at_levels(
    evaluator: ScheduleEvaluator, way: TokenWay, levels: Sequence[float]
) -> tuple[TokenWay, list[tuple[float, TokenSchedule]]]:
    """The way, and (MACs, schedule) of every level that can be reached. All stretches are tried at the middle level,
    and where tokens come back and how; at the others, stretches like the best one of the level before."""
    windows = window_profiles(len(evaluator.analysis.tokens.points))
    middle = len(levels) // 2
    reached: dict[float, TokenSchedule] = {}
    with evaluator.execution.progress.stage("token schedules", 1 + len(levels)) as advance:
        window = best_window(evaluator, way, levels[middle], windows)
        advance(1)
        if window is not None:
            way = best_unmerging(evaluator, way, windows[window], levels[middle])
        for outward in (levels[middle:], levels[:middle][::-1]):
            near = window
            for level in outward:
                near = best_window(evaluator, way, level, windows, near)
                schedule = best_variant(evaluator, way, level, windows[near]) if near is not None else None
                if schedule is not None:
                    reached[level] = schedule
                advance(1)
    return way, [(level, reached[level]) for level in levels if level in reached]


def best_unmerging(evaluator: ScheduleEvaluator, way: TokenWay, profile: DepthProfile, macs: float) -> TokenWay:
    """Where tokens come back, and in which form, so that the outputs change least at ``macs``; ``way`` where all
    tokens that go are never needed."""
    points = evaluator.analysis.tokens.points
    if not any(point.exits for point in points):
        return way
    inside = [point.block for point, share in zip(points, profile, strict=True) if share]
    middle = inside[len(inside) // 2 - 1]
    forms: tuple[UnmergeForm, ...] = ("delta", "copy")
    places = dict.fromkeys(((), (inside[-1],), (middle,), (middle, inside[-1])))
    drifts: list[tuple[float, int, TokenWay]] = []
    for number, tried in enumerate(TokenWay(way.method, back, form) for back in places for form in forms):
        schedule = evaluator.scale_to_macs(tried, profile, macs)
        if schedule is not None:
            drifts.append((evaluator.drift(tried, schedule), number, tried))
    return min(drifts)[2] if drifts else way


def split_with_widths(
    evaluator: ScheduleEvaluator,
    way: TokenWay,
    levels: Sequence[tuple[float, TokenSchedule]],
    calibration: Calibration,
    widths: PlanRequest,
    macs: float,
) -> Analysis:
    """The level at which tokens and widths together are predicted to change the outputs least; with all tokens, where
    widths alone are."""
    _, middle = levels[len(levels) // 2]
    reduced = analyze_with_steps(evaluator.analysis, evaluator.steps(way, middle))
    try:
        predicted = predict_width_drift(evaluator, reduced, evaluator.drift(way, middle), calibration, widths, macs)
    except UserError:  # widths cannot reach the rest: tokens alone
        return analyze_with_steps(evaluator.analysis, evaluator.steps(way, levels[0][1]))
    scored = [
        (evaluator.drift(way, schedule) + predicted(macs / evaluator.macs(way, schedule)), schedule)
        for _, schedule in levels
    ]
    least, best = min(scored)
    whole = evaluator.analysis.cost.macs - evaluator.analysis.dead_macs
    if predicted(macs / whole) <= least:
        return evaluator.analysis
    return analyze_with_steps(evaluator.analysis, evaluator.steps(way, best))


def predict_width_drift(
    evaluator: ScheduleEvaluator,
    reduced: Analysis,
    token_drift: float,
    calibration: Calibration,
    widths: PlanRequest,
    macs: float,
) -> Callable[[float], float]:
    """share of the reduced model's MACs to come down to -> predicted change of the outputs (infinite: out of reach).

    Curves are of one group at a time. Their sum is scaled by how much more the outputs change when all groups are cut
    together. This is measured at ``macs``, and narrower where the outputs hardly change there. Raises UserError where
    ``macs`` is out of reach.
    """
    base = 1 - reduced.dead_macs / reduced.cost.macs

    def at_macs(share: float) -> Budget:
        target = ResourceTarget("macs", round(share, 9))
        return replace(widths.budget, target=target, uniform=False, allocator="loss")

    effort = curve_effort(widths)
    budget = at_macs(macs / reduced.cost.macs)
    request = replace(widths, budget=budget, workload=None, full_curves=True, effort=effort)
    plan = make_plan(reduced, request, calibration, execution=evaluator.execution)
    values = {g.id: np.zeros((g.blocks, g.size)) for g in reduced.groups}
    scores = UnitScores(reduced, "", values, curves=plan.loss_curves)

    def summed(slices: SlicePlan) -> float:
        return sum(float(plan.loss_curves[g.id][slices.kept_width(g)]) for g in reduced.groups if g.id in slices.keep)

    plan, together = telling_plan(evaluator, plan, token_drift)
    least = 0.0 if effort == "quick" else 1.0  # curves that were not measured are in a unit of their own
    scale = min(max(least, together / max(summed(plan.slices), 1e-12)), UNUSABLE_CHANGE)

    def predicted(share: float) -> float:
        if share >= 1:
            return 0.0
        try:
            return scale * summed(make_slice_plan(scores, at_macs(share * base)))
        except UserError:
            return float("inf")

    return predicted


def telling_plan(evaluator: ScheduleEvaluator, plan: PruningPlan, token_drift: float) -> tuple[PruningPlan, float]:
    """``plan``, or one with narrower widths where these hardly change the outputs, and the change by its widths."""
    budget = plan.budget
    assert budget is not None and budget.target is not None
    least = NARROWEST * (1 - plan.analysis.dead_macs / plan.analysis.cost.macs)
    while True:
        change = max(evaluator.output_change(one_shot_pruned_model(plan)) - token_drift, 0.0)
        share = round(NARROWER * budget.target.share, 9)
        if change >= TELLING_SHARE * token_drift or share < least:
            return plan, change
        budget = replace(budget, target=replace(budget.target, share=share))
        try:
            plan = plan.for_budget(budget)
        except UserError:  # out of reach
            return plan, change


def curve_effort(widths: PlanRequest) -> Effort:
    """The effort at which loss curves are measured for the choice of tokens: no plan is searched there."""
    return "quick" if widths.effort == "quick" else "normal"


def one_shot_pruned_model(plan: PruningPlan) -> ir.Model:
    """The plan's model, all layers fitted to the dense one at once."""
    slices, source = plan.slices, plan.analysis.traced_graph
    if plan.closed_forms is not None:
        slices = in_rotated_order(plan.closed_forms, slices)
        with using_algebra(plan.execution.algebra):
            source = fit_parallel(plan.closed_forms, slices)
    model = rewrite_model(source, cuts_of(slices)).model
    assert plan.analysis.reduction is not None
    plan.analysis.reduction.embed_decisions(model)
    return model
