"""Token requests (--tokens): reduce tokens by a specification, or by a schedule that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from snpc.errors import UserError
from snpc.graph import choose_dim_sizes
from snpc.passes import Analysis
from snpc.pipeline.planner import PlanRequest
from snpc.pipeline.token_decisions import count_tokens, model_decisions
from snpc.pipeline.token_schedule import ScheduleEvaluator, choose_token_schedule
from snpc.planning import ResourceTarget
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import Workload, time_pair, write_narrowed
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.statistics import measure_token_relevance
from snpc.temporary import temporary_folder
from snpc.tokens import (
    TokenReductionPlan,
    TokenStep,
    externalize_decisions,
    parse_token_request,
    reduce_tokens,
    replay_decisions,
    steps_for,
    stream_dtype,
)
from snpc.types import LAYER_ROLE, Role

AUTO_TOKENS, ALL_TOKENS = "auto", "none"
MIN_TIME_PER_MACS = 0.5  # of the share of the MACs that fewer tokens save, at least this part must be saved in time


def effective_token_request(
    tokens: str | None,
    analysis: Analysis,
    calibration: Calibration | None,
    target: ResourceTarget | None,
    roles: Sequence[Role] = (),
) -> str | None:
    """What ``tokens`` asks for: a specification, "auto", or None where all tokens stay.

    ``tokens`` None is the default: "auto" for a target in MACs or of latency, where there is calibration data and the
    model's tokens can get fewer, unless whole layers are all of ``roles``. "none": all tokens stay. Raises UserError
    where "auto" is to share a target with whole layers alone.
    """
    layers_alone = set(roles) == {LAYER_ROLE}
    if tokens is not None:
        if layers_alone and tokens.strip() == AUTO_TOKENS:
            raise UserError(
                "--tokens auto shares a target with widths: give --roles all,layer, or say which tokens go (--tokens "
                "merge:8)"
            )
        return None if tokens.strip() == ALL_TOKENS else tokens.strip()
    serves = not layers_alone and target is not None and target.kind in ("macs", "latency")
    return AUTO_TOKENS if serves and calibration is not None and analysis.tokens.points else None


def apply_token_request(
    analysis: Analysis,
    calibration: Calibration | None,
    tokens: str | None,
    *,
    target: ResourceTarget | None = None,
    widths: PlanRequest | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    evaluator: ScheduleEvaluator | None = None,
) -> Analysis:
    """The analysis of the model with its tokens reduced as ``tokens`` asks: "merge:13@1-6", "auto", "none" or the
    default, see ``effective_token_request``.

    ``target``, ``widths`` and ``evaluator`` serve "auto": see ``choose_token_schedule``.
    """
    roles = widths.budget.roles if widths is not None else ()
    widths = without_layers(widths) if widths is not None else None
    tokens = effective_token_request(tokens, analysis, calibration, target, roles)
    if tokens is None:
        return analysis
    if tokens != AUTO_TOKENS:
        return reduce_tokens(analysis, tokens, measure_offline_scores(analysis, calibration, tokens, execution))
    if target is None or target.kind != "latency":
        return choose_token_schedule(analysis, calibration, target, widths, execution, evaluator)
    workload = (widths.workload if widths is not None else None) or Workload()
    macs = macs_for_latency(analysis, target, workload, execution)
    reduced = choose_token_schedule(analysis, calibration, macs, widths, execution, evaluator)
    return reduced if saves_time(analysis, reduced, workload, execution) else analysis


def without_layers(request: PlanRequest) -> PlanRequest:
    """The request for widths alone, beside which tokens are chosen."""
    roles = tuple(role for role in request.budget.roles if role != LAYER_ROLE)
    return replace(request, budget=replace(request.budget, roles=roles)) if roles else request


def macs_for_latency(
    analysis: Analysis, target: ResourceTarget, workload: Workload, execution: Execution
) -> ResourceTarget:
    """The target in MACs by which tokens are chosen for a latency: the same share of the dense model."""
    share = target.share
    if target.ms is not None:
        with temporary_folder() as folder:
            dense = workload.timed_file(analysis.model.path, folder / "dense")
            share = target.ms / time_pair(analysis, dense, dense, workload, execution)[0]
    return ResourceTarget("macs", min(share, 1.0))


def saves_time(analysis: Analysis, reduced: Analysis, workload: Workload, execution: Execution) -> bool:
    """Are fewer tokens faster? In a small model the nodes that decide may take the time that they save."""
    if reduced.reduction is None:
        return True
    saved_macs = 1 - (reduced.cost.macs - reduced.dead_macs) / (analysis.cost.macs - analysis.dead_macs)
    with temporary_folder() as folder:
        files = [
            workload.timed_file(write_narrowed(model, (), 1.0, folder / f"{stem}.onnx"), folder / stem)
            for stem, model in (("all", analysis), ("fewer", reduced))
        ]
        _, share = time_pair(analysis, files[0], files[1], workload, execution)
    return 1 - share >= MIN_TIME_PER_MACS * saved_macs


def measure_offline_scores(
    analysis: Analysis, calibration: Calibration | None, tokens: str, execution: Execution = DEFAULT_EXECUTION
) -> dict[int, tuple[float, ...]]:
    """Block -> the scores that its method in ``tokens`` needs from calibration data. Empty without data.

    Those are the relevance of every position, or the average share of tokens that stay.
    """
    request = parse_token_request(analysis, tokens)
    if calibration is None:
        return {}
    points, scores = analysis.tokens.points, dict[int, tuple[float, ...]]()
    if any(method.needs_offline and not method.input_adaptive for method, _ in request.values()):
        batches = execution.track("token relevance", calibration.batches(), len(calibration.batch_plan))
        scores |= measure_token_relevance(analysis.model.graph, points, batches, execution)
    adaptive = [block for block, (method, amount) in request.items() if method.input_adaptive and amount.share != 1]
    if adaptive:
        scores |= dict.fromkeys(adaptive, (1.0,))
        scores |= measure_kept_shares(analysis, steps_for(analysis, request, scores), calibration, execution)
    return scores


def measure_kept_shares(
    analysis: Analysis, steps: Sequence[TokenStep], calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> dict[int, tuple[float, ...]]:
    """Block -> the average share of a sample's tokens that stay, without leading ones. Tokens that are kept only for
    another sample of the batch do not count."""
    dim_sizes, facts = choose_dim_sizes(analysis.model.graph)
    model = externalize_decisions(analysis.model.graph, facts, dim_sizes, steps)
    dtypes = {s.point.value: stream_dtype(facts, s.point) for s in steps}
    TokenReductionPlan(tuple(steps), dtypes).embed_decisions(model)
    names = [name for step in steps for name in step.names]
    totals = np.zeros((len(steps), 2))
    for feeds, decided in zip(
        calibration.batches(), model_decisions(model, names, calibration, execution), strict=True
    ):
        first = count_tokens(analysis.model.graph, steps[0].point, feeds)
        before = np.full(len(next(iter(decided.values()))), first)
        for k, (step, (_, _, sizes)) in enumerate(zip(steps, replay_decisions(steps, decided, first), strict=True)):
            after = (sizes > 0).sum(1)
            totals[k] += (before - step.settings.leading).sum(), (after - step.settings.leading).sum()
            before = after
    return {s.point.block: (float(b / a),) for s, (a, b) in zip(steps, totals, strict=True) if s.method.input_adaptive}
