"""Task metrics: scores of outputs on labels, from 0 to 1, higher is better.

top1      share of the labels that are the largest entry of the output
top5      share of the labels that are among the five largest
f1        F1 of each class, averaged over the classes that were labelled or predicted
spearman  rank correlation of one number per sample with the labels; of an embedding per sample, the cosine of samples
          2i and 2i+1 with label i
FILE.py:FUNCTION  a function (outputs, labels) -> score, whose second parameter is called ``labels``
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration import find_script_function, load_script_function
from snpc.types import AnyArray, BoolArray, FloatArray, TaskChange

IGNORED_LABEL = -100  # tokens without a label, as transformers' data collators mark them
TASK_METRICS = ("top1", "top5", "f1", "spearman")
RETURNS_SCORE = (
    "it should take the first output of all samples and the labels, and return a number, higher for the better"
)


@dataclass(frozen=True)
class TaskScore:
    """``value``: of all samples. ``correct``: [labels], for a share of right answers; empty for any other metric."""

    value: float
    correct: BoolArray = field(default_factory=lambda: np.zeros(0, bool), repr=False)


@dataclass(frozen=True)
class TaskMetric:
    """``function``: the user's own; None for one of ``TASK_METRICS``. Raises UserError for another name."""

    name: str = "top1"
    function: Callable[[AnyArray, AnyArray], float] | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.name not in TASK_METRICS:
            raise UserError(
                f"task metric {self.name!r}: choose from {', '.join(TASK_METRICS)}, or give FILE.py:FUNCTION"
            )

    def reduce(self, output: AnyArray) -> AnyArray:
        """What is kept of the output of one batch."""
        if self.function is not None or self.name == "spearman":
            return output
        if output.ndim < 2:
            raise UserError(f"{self.name} takes an output with an entry per class, and the first has {output.shape}")
        if self.name != "top5":
            return np.asarray(output.argmax(-1))
        count = min(5, output.shape[-1])
        return np.asarray(np.argpartition(-output.astype(np.float64), count - 1, axis=-1)[..., :count])

    def score(self, batches: Sequence[AnyArray], labels: AnyArray) -> TaskScore:
        """Of what ``reduce`` kept of all batches. Raises UserError where it does not fit the ``labels``."""
        kept = np.concatenate([np.atleast_1d(batch) for batch in batches])
        if self.function is not None:
            value = float(np.asarray(self.function(kept, labels)))
            if not np.isfinite(value):
                raise UserError(f"{self.name} returned {value}: {RETURNS_SCORE}")
            return TaskScore(value)
        if self.name == "spearman":
            return TaskScore(rank_correlation(kept, labels))
        expected = kept.shape[:-1] if self.name == "top5" else kept.shape
        if expected != labels.shape:
            raise UserError(f"labels have the shape {list(labels.shape)}, the outputs' top entries {list(expected)}")
        known = labels != IGNORED_LABEL
        kept, labels = kept[known], labels[known]
        if self.name == "f1":
            return TaskScore(mean_f1(kept, labels))
        correct = (kept == labels[..., None]).any(-1) if self.name == "top5" else kept == labels
        return TaskScore(float(correct.mean()), correct)


TOP1 = TaskMetric("top1")


def parse_task_metric(text: str) -> TaskMetric:
    """A name, or ``FILE.py:FUNCTION``, which is run."""
    script, colon, function = text.rpartition(":")
    if not colon or not script.endswith(".py"):
        return TaskMetric(text.strip())
    return TaskMetric(text, load_script_function(Path(script), function, RETURNS_SCORE))


def is_task_metric(text: str) -> bool:
    """Is it the name of a task metric, or a function of a file whose second parameter is called ``labels``? The file is
    run."""
    script, colon, function = text.rpartition(":")
    if not colon or not script.endswith(".py"):
        return text.strip() in TASK_METRICS
    if not Path(script).is_file():
        return False
    return [*signature_of(find_script_function(Path(script), function, RETURNS_SCORE))][1:2] == ["labels"]


def signature_of(function: Callable[..., Any]) -> Mapping[str, object]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function in C
        return {}


def rank_correlation(outputs: AnyArray, labels: AnyArray) -> float:
    """Spearman's, of one number per sample, or of the cosines of pairs of embeddings. Raises UserError where there is
    neither."""
    from scipy.stats import spearmanr

    rows = outputs.reshape(len(outputs), -1).astype(np.float64)
    if rows.shape[1] == 1 and len(rows) == len(labels):
        numbers = rows[:, 0]
    elif len(rows) == 2 * len(labels):
        numbers = cosines(rows[0::2], rows[1::2])
    else:
        raise UserError(
            f"spearman takes a number per label, or embeddings of the two texts of each label, one after the other: "
            f"there are {len(labels)} labels, and the first output has the shape {list(outputs.shape)}"
        )
    if len(labels) < 3 or np.ptp(numbers) == 0 or np.ptp(labels) == 0:
        raise UserError("spearman takes at least three labels, and neither they nor the outputs may all be equal")
    return float(spearmanr(numbers, labels).statistic)


def cosines(a: FloatArray, b: FloatArray) -> FloatArray:
    """[pairs, width] each -> [pairs]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny))


def mean_f1(predicted: AnyArray, labels: AnyArray) -> float:
    """Macro average over the classes that occur on either side."""
    scores = []
    for label in np.union1d(predicted, labels):
        hits = ((predicted == label) & (labels == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores)) if scores else 0.0


def compare_scores(before: TaskScore, after: TaskScore, metric: TaskMetric, samples: int, source: str) -> TaskChange:
    """Of two models on the same samples; the error is that of the difference, whose answers are paired."""
    difference = after.correct.astype(np.float64) - before.correct
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return TaskChange(metric.name, before.value, after.value, samples, source, error)
