"""Evaluation of a model file on data of its own: accuracy where there are labels, perplexity of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.perplexity import LanguageHead, Surprise
from snpc.runtime.evaluation.task_metrics import TOP1, TaskMetric, TaskScore, compare_scores
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, open_runner
from snpc.types import AnyArray, TaskChange

MAX_KEPT_BYTES = 512 << 20  # of outputs: those of a language model over all of its data would not fit


@dataclass(frozen=True)
class EvaluationData:
    """Inputs to evaluate on, in any form of calibration data, labels [samples, ...] where there are some, and how
    outputs are scored on them.

        data = snpc.load_calibration("eval.npz", model.inputs, samples=400, held_out=0)
        snpc.EvaluationData(data, numpy.load("eval.npz")["labels"], snpc.TaskMetric("top5"))
    """

    data: Calibration
    labels: AnyArray | None = None
    metric: TaskMetric = TOP1


@dataclass(frozen=True)
class Evaluated:
    """What a model or artifact makes of evaluation data. ``outputs``: by name, of the first batches. ``score``: of the
    first output on the labels; None without labels. ``surprise``: of a language model."""

    outputs: Sequence[dict[str, AnyArray]]
    score: TaskScore | None
    surprise: Surprise


def evaluate(
    path: Path,
    evaluation: EvaluationData,
    execution: Execution = DEFAULT_EXECUTION,
    head: LanguageHead | None = None,
    keep: int | None = None,
) -> Evaluated:
    """Run a model or artifact on all of the data. ``head``: that of a language model. ``keep``: of how many batches
    outputs are kept; None: up to ``MAX_KEPT_BYTES``, those of a batch at least."""
    runner = open_runner(path, execution=execution, memory="lean")
    outputs: list[dict[str, AnyArray]] = []
    kept, surprise, size = [], Surprise(), 0
    for feeds in execution.track("evaluation", evaluation.data.batches(), len(evaluation.data.batch_plan)):
        made = runner.run(feeds)
        if evaluation.labels is not None:
            kept.append(evaluation.metric.reduce(next(iter(made.values()))))
        if head is not None:
            surprise += head.surprise(feeds, made)
        if len(outputs) < keep if keep is not None else size < MAX_KEPT_BYTES:
            outputs.append(made)
            size += sum(array.nbytes for array in made.values())
    score = evaluation.metric.score(kept, evaluation.labels) if evaluation.labels is not None else None
    return Evaluated(outputs, score, surprise)


def measure_task(
    original: Path, pruned: Path, evaluation: EvaluationData, execution: Execution = DEFAULT_EXECUTION
) -> TaskChange:
    """The scores of two files on the labels. Raises UserError without labels."""
    before, after = (task_score(path, evaluation, execution) for path in (original, pruned))
    return task_change(before, after, evaluation)


def task_change(before: TaskScore, after: TaskScore, evaluation: EvaluationData) -> TaskChange:
    """Of the scores of two files on the same labels."""
    return compare_scores(before, after, evaluation.metric, evaluation.data.samples, evaluation.data.source)


def task_score(path: Path, evaluation: EvaluationData, execution: Execution = DEFAULT_EXECUTION) -> TaskScore:
    """The score of a file on the labels. Raises UserError without labels."""
    score = evaluate(path, evaluation, execution, keep=0).score
    if score is None:
        raise UserError("a task is scored on labels: give some")
    return score
