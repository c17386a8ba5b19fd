"""Evaluation of a model file on data of its own: accuracy where there are labels, perplexity of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.perplexity import LanguageHead, Surprise
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, open_runner
from snpc.types import AnyArray

MAX_KEPT_BYTES = 512 << 20  # of outputs: those of a language model over all of its data would not fit


@dataclass(frozen=True)
class EvaluationData:
    """Inputs to evaluate on, in any form of calibration data, and labels [samples, ...] where there are some."""

    data: Calibration
    labels: AnyArray | None = None


@dataclass(frozen=True)
class Evaluated:
    """What a model or artifact makes of evaluation data. ``outputs``: by name, of the first batches. ``accuracy``:
    share of the labels that are the largest entry of the first output; None without labels. ``surprise``: of a language
    model."""

    outputs: Sequence[dict[str, AnyArray]]
    accuracy: float | None
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
    predictions, surprise, size = [], Surprise(), 0
    for feeds in execution.track("evaluation", evaluation.data.batches(), len(evaluation.data.batch_plan)):
        made = runner.run(feeds)
        if evaluation.labels is not None:
            predictions.append(next(iter(made.values())).argmax(-1))
        if head is not None:
            surprise += head.surprise(feeds, made)
        if len(outputs) < keep if keep is not None else size < MAX_KEPT_BYTES:
            outputs.append(made)
            size += sum(array.nbytes for array in made.values())
    return Evaluated(outputs, top1_accuracy(predictions, evaluation.labels), surprise)


def top1_accuracy(predictions: Sequence[AnyArray], labels: AnyArray | None) -> float | None:
    """Share of ``labels`` that were predicted, batch by batch; None without labels."""
    if labels is None:
        return None
    predicted = np.concatenate(predictions)
    if predicted.shape != labels.shape:
        raise UserError(f"labels have the shape {list(labels.shape)}, the outputs' top entries {list(predicted.shape)}")
    return float((predicted == labels).mean())
