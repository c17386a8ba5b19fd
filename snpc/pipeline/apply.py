"""Apply a plan: write the pruned model and verify it; search where the plan has to meet a drift or a latency."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from snpc.pipeline.candidate import PrunedModel, Stopwatch, publish_candidate, staging_folder_for, write_candidate
from snpc.pipeline.planner import PruningPlan
from snpc.pipeline.search import check_labels, search_plans
from snpc.pipeline.verify import Reference
from snpc.runtime.evaluation import EvaluationData, measure_task
from snpc.temporary import TemporaryFolder


def apply(
    plan: PruningPlan,
    path: Path | str | None = None,
    *,
    stopwatch: Stopwatch | None = None,
    reference: Reference | None = None,
    evaluation: EvaluationData | None = None,
) -> PrunedModel:
    """Write the pruned model to ``path``, verified before it is renamed into place. None: nothing is left on disk;
    ``PrunedModel.model`` has the result.

    Of a budget for a drift, a perplexity, a drop or a latency, the limit is measured on written candidates, and wider
    or narrower plans are tried while it is exceeded or clearly not exhausted: at most ``search.SEARCH_ROUNDS``.
    ``reference``: what the original makes of the samples to verify on, where it was run for another plan
    (``candidate_reference``). ``evaluation``: data with labels, on which both models are scored (``PrunedModel.task``),
    and on which a drop is measured.

    Raises UserError where ``path`` cannot be written or a latency cannot be reached; CheckFailed where the written
    model differs from the masked one, or where the smallest cut exceeds the limit. Then nothing is left at ``path``.
    """
    check_labels(plan.budget, evaluation)
    stopwatch = stopwatch or Stopwatch(plan.execution.progress)
    if path is not None:
        return with_task_score(apply_to_file(plan, Path(path), stopwatch, reference, evaluation), plan, evaluation)
    folder = TemporaryFolder()
    target = folder.path / plan.analysis.model.path.name
    written = with_task_score(apply_to_file(plan, target, stopwatch, reference, evaluation), plan, evaluation)
    return replace(written, folder=folder)


def with_task_score(result: PrunedModel, plan: PruningPlan, evaluation: EvaluationData | None) -> PrunedModel:
    """The result with the score of its task, where there are labels and a search has not measured it."""
    if evaluation is None or evaluation.labels is None or result.task is not None:
        return result
    return replace(result, task=measure_task(plan.analysis.model.path, result.path, evaluation, plan.execution))


def apply_to_file(
    plan: PruningPlan,
    target: Path,
    stopwatch: Stopwatch,
    reference: Reference | None,
    evaluation: EvaluationData | None,
) -> PrunedModel:
    budget = plan.budget
    if budget is not None and plan.scores is not None and (budget.is_latency or budget.limits_quality):
        return search_plans(plan, budget, plan.scores, target, stopwatch, reference, evaluation)
    with staging_folder_for(plan, target) as folder:
        candidate = write_candidate(plan, folder / target.name, stopwatch, reference)
        return publish_candidate(candidate, plan, target, stopwatch)
