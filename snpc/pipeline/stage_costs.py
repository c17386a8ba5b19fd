"""What the stages of a run cost, in plain passes of the model over its calibration data: a progress that is told it
knows the time left over stages that have not begun.

The figures are round ones of whole runs (a ViT of the base size and smaller ones). Whoever shows the time left corrects
them by what the stages of this run take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.pipeline.planner import PlanRequest, check_effort, default_method, needs_loss_curves
from snpc.pipeline.token_request import AUTO_TOKENS, effective_token_request, without_layers
from snpc.pipeline.token_schedule import SCHEDULE_SAMPLES, TOKEN_SAVING_SHARES, curve_effort
from snpc.planning import Effort, PruningMethod, SlicePlan, groups_to_prune
from snpc.runtime.batches import StreamedModel, open_file
from snpc.runtime.calibration import MAX_HELD_OUT, Calibration
from snpc.runtime.evaluation import VERIFICATION_BATCHES
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, StageCost
from snpc.runtime.sensitivity import (
    CURVE_SAMPLES,
    CURVE_SHARES,
    LAYER_SAMPLES,
    REFINEMENT_ROUNDS,
    REFITTED_SETS,
    SAMPLES_PER_WIDTH,
    removable_sublayers,
    search_samples,
)
from snpc.tokens import TOKEN_METHODS
from snpc.types import LAYER_ROLE, Group

STATISTICS_PASSES = 1.8
LAYERS_PASSES = 2.5
ELIMINATION_MACS = 3.0  # times the cube of a group's units: products in float64 count twice
TRIAL_SHARE = 0.3  # of a plain pass over its samples that a trial takes: it runs only behind what it changes
PRUNED_SHARE = 0.8  # of a plain pass that one of the pruned model takes
FIRST_SCHEDULES, MORE_SCHEDULES = 15, 13  # token schedules that are run, at one cost and at each other one
SEARCH_CANDIDATES = 4  # plans that are written on the way to a drift or a latency
TIMED_SAMPLES = 2  # that are run to tell how long a plain pass takes


def run_stages(
    analysis: Analysis,
    calibration: Calibration | None,
    request: PlanRequest | None,
    tokens: str | None = None,
    *,
    method: PruningMethod | None = None,
    writes: bool = True,
) -> list[StageCost]:
    """The stages of a prune, or with ``writes`` False of a plan. ``request``: None where no width is cut; ``method``
    then says whether weights make up for tokens. Nothing is foreseen without calibration data."""
    if calibration is None:
        return []
    target = request.budget.target if request is not None else None
    roles = request.budget.roles if request is not None else ()
    stages: list[StageCost] = []
    chosen = effective_token_request(tokens, analysis, calibration, target, roles)
    if chosen == AUTO_TOKENS:
        stages += token_stages(analysis, calibration, without_layers(request) if request is not None else None)
    if request is not None:
        stages += planning_stages(analysis, calibration, request)
    if not writes:
        return stages
    again = layer_stages(analysis, calibration, request) if request is not None and plans_again(request) else []
    fits = fits_weights(calibration, request, chosen, method)
    return stages + writing_stages(calibration, request, fits, sum(cost for _, cost in again))


def effort_costs(
    analysis: Analysis,
    calibration: Calibration,
    request: PlanRequest,
    tokens: str | None = None,
    *,
    writes: bool = True,
) -> dict[Effort, float]:
    """Effort -> the cost of ``run_stages`` in plain passes, of the efforts that can serve the request."""
    costs: dict[Effort, float] = {}
    for effort in get_args(Effort):
        asked = replace(request, effort=effort)
        try:
            check_effort(asked, calibration)
        except UserError:
            continue
        costs[effort] = sum(cost for _, cost in run_stages(analysis, calibration, asked, tokens, writes=writes))
    return costs


def plain_pass_seconds(
    analysis: Analysis, calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> float | None:
    """Seconds of a plain pass over the calibration data, from ``TIMED_SAMPLES`` of it run twice: the first run warms
    up. None where the model cannot be run here, or is streamed, which would take long."""
    feeds = next(calibration.first_rows(TIMED_SAMPLES))
    samples = min(TIMED_SAMPLES, calibration.batch) if calibration.batch else TIMED_SAMPLES
    try:
        with open_file(analysis.model.path, execution) as run:
            if isinstance(run, StreamedModel):
                return None
            run(feeds)
            start = time.perf_counter()
            run(feeds)
            return (time.perf_counter() - start) / samples * calibration.samples
    except UserError:
        return None


def token_stages(analysis: Analysis, calibration: Calibration, request: PlanRequest | None) -> list[StageCost]:
    """--tokens auto: schedules are run on some samples, and where widths are cut too they are planned once before."""
    trial = min(SCHEDULE_SAMPLES / max(calibration.samples, 1), 1.0)
    schedules = FIRST_SCHEDULES + (MORE_SCHEDULES * (len(TOKEN_SAVING_SHARES) - 1) if request is not None else 0)
    stages = [
        ("token schedules, original", trial),
        ("token methods", trial * len(TOKEN_METHODS)),
        ("token schedules", trial * schedules),
    ]
    if request is None:
        return stages
    return stages + planning_stages(analysis, calibration, replace(request, effort=curve_effort(request)), True)


def planning_stages(
    analysis: Analysis, calibration: Calibration, request: PlanRequest, full_curves: bool = False
) -> list[StageCost]:
    """The stages of ``make_plan``."""
    if LAYER_ROLE in request.budget.roles:
        return stages_with_layers(analysis, calibration, request)
    stages: list[StageCost] = []
    groups = groups_to_prune(analysis, request.budget)
    method = method_of(calibration, request)
    stages.append(("statistics", STATISTICS_PASSES))
    if method != "select":
        stages.append(("order", elimination_passes(analysis, calibration, groups)))
    if request.budget.is_latency:
        stages.append(("latency table", 1.0))
    if needs_loss_curves(request.budget, method, request.effort):
        if full_curves or request.full_curves:
            samples = len(CURVE_SHARES) * CURVE_SAMPLES
        else:
            samples = (1 + REFINEMENT_ROUNDS) * SAMPLES_PER_WIDTH
        trials = samples * len(groups) * TRIAL_SHARE
        stages.append(("trials", trials / max(calibration.samples, 1)))
    if request.effort == "search":
        stages.append(("joint search", search_samples(len(groups)) / max(calibration.samples, 1)))
    return stages


def stages_with_layers(analysis: Analysis, calibration: Calibration, request: PlanRequest) -> list[StageCost]:
    """A target or a limit that widths serve too has them measured with all layers before."""
    shared = request.budget.ratio is None and set(request.budget.roles) != {LAYER_ROLE}
    before = planning_stages(analysis, calibration, without_layers(request), True) if shared else []
    return before + layer_stages(analysis, calibration, request)


def layer_stages(analysis: Analysis, calibration: Calibration, request: PlanRequest) -> list[StageCost]:
    """Whole layers are tried one by one, and then a few of them at each step. Then widths are measured without those
    that go."""
    trial = min(LAYER_SAMPLES / max(calibration.samples, 1), 1.0)
    singles = 2 * len(removable_sublayers(analysis, request.budget))
    layers = [("layer means", 1.0), ("layer trials", trial * singles), ("layer search", trial * singles)]
    if method_of(calibration, request) == "auto" and request.effort != "quick":
        layers.append(("refitted without layers", REFITTED_SETS * LAYERS_PASSES))
    if set(request.budget.roles) == {LAYER_ROLE}:
        return layers
    return layers + planning_stages(analysis, calibration, without_layers(request))


def plans_again(request: PlanRequest) -> bool:
    """Is each candidate for a limit of quality planned anew, because layers go?"""
    return LAYER_ROLE in request.budget.roles and request.budget.limits_quality


def writing_stages(
    calibration: Calibration, request: PlanRequest | None, fits: bool, planning: float = 0.0
) -> list[StageCost]:
    """The stages of ``apply``. ``fits``: are weights fitted layer by layer? ``planning``: the cost of a plan, where
    each candidate but the first has a new one."""
    stages = [*([("layers", LAYERS_PASSES)] if fits else []), *verification_stages(calibration)]
    if request is None or not (request.budget.limits_quality or request.budget.is_latency):
        return stages
    written = SEARCH_CANDIDATES * sum(cost for _, cost in stages)
    return [("search", written + (SEARCH_CANDIDATES - 1) * planning)]


def fits_weights(
    calibration: Calibration, request: PlanRequest | None, tokens: str | None, method: PruningMethod | None
) -> bool:
    """Are weights fitted layer by layer: to the widths that are left, or where no width is cut to the tokens?"""
    if request is not None:
        return method_of(calibration, request) == "auto"
    return tokens is not None and method in (None, "auto")


def completion_stages(slices: SlicePlan, calibration: Calibration) -> list[StageCost]:
    """The stages of ``complete_plan``, and of what writes or verifies the model afterwards."""
    analysis = slices.analysis
    stages: list[StageCost] = []
    if slices.method != "select":
        groups = [group for group in analysis.groups if group.id in slices.keep]
        stages += [("statistics", STATISTICS_PASSES), ("order", elimination_passes(analysis, calibration, groups))]
    if slices.method == "auto":
        stages.append(("layers", LAYERS_PASSES))
    return stages + verification_stages(calibration)


def sweep_stages(
    analysis: Analysis,
    calibration: Calibration,
    requests: Sequence[PlanRequest | None],
    tokens: Sequence[str | None],
    method: PruningMethod | None = None,
) -> list[StageCost]:
    """The stages of a sweep: ``requests`` and ``tokens`` of each target, ``method`` as of ``run_stages``. Targets
    whose tokens are not chosen share one measurement; the original is run once."""
    stages: list[StageCost] = []
    shared = [r for r, t in zip(requests, tokens, strict=True) if t != AUTO_TOKENS and r is not None]
    for request, token_request in zip(requests, tokens, strict=True):
        if token_request == AUTO_TOKENS:
            stages += token_stages(analysis, calibration, request)
            stages += planning_stages(analysis, calibration, request, full_curves=True) if request is not None else []
    if shared:
        stages += planning_stages(analysis, calibration, shared[0], full_curves=True)
    original, *rest = verification_stages(calibration)
    stages.append(original)
    for request, token_request in zip(requests, tokens, strict=True):
        fits = fits_weights(calibration, request, token_request, method)
        stages += [("layers", LAYERS_PASSES), *rest] if fits else rest
    return stages


def verification_stages(calibration: Calibration) -> list[StageCost]:
    samples = max(calibration.samples, 1)
    judged = calibration.held_out.samples if calibration.held_out is not None else min(samples, MAX_HELD_OUT)
    masked = min(VERIFICATION_BATCHES * calibration.batch, judged)
    return [
        ("verification, original", judged / samples),
        ("verification, pruned", PRUNED_SHARE * judged / samples),
        ("verification, masked", masked / samples),
    ]


def method_of(calibration: Calibration, request: PlanRequest) -> PruningMethod:
    return request.method or default_method(calibration, request.criterion is None)


def elimination_passes(analysis: Analysis, calibration: Calibration, groups: Sequence[Group]) -> float:
    """The order of units, which does not depend on the number of samples."""
    macs = sum(ELIMINATION_MACS * group.blocks * group.size**3 for group in groups)
    return macs / max(analysis.cost.macs * calibration.samples, 1)
