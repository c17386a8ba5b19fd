"""Objectives of an adaptive schedule: how far the outputs may drift, or how many correct answers may be lost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from snpc.errors import UserError
from snpc.runtime.evaluation import EvaluationData, task_score
from snpc.torch.finetune import FinetuneResult
from snpc.torch.training import run_fingerprint


class PruningObjective(Protocol):
    """A value that grows as a model gets worse, and its limit."""

    @property
    def limit(self) -> float: ...

    @property
    def fingerprint(self) -> str:
        """Identifies all that decides the value."""

    def measure(self, result: FinetuneResult) -> float: ...

    def __str__(self) -> str:
        """Completes "no cut keeps ..."."""


@dataclass(frozen=True)
class DriftLimit:
    """The outputs after training stay within a relative change of ``limit``. Raises UserError for 0 or less."""

    limit: float

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise UserError(f"drift limit {self.limit:g}: must be more than 0")

    @property
    def fingerprint(self) -> str:
        return f"drift {self.limit!r}"

    def measure(self, result: FinetuneResult) -> float:
        return max_output_drift(result)

    def __str__(self) -> str:
        return f"the drift within {self.limit:g}"


@dataclass(frozen=True)
class AccuracyDrop:
    """The accuracy on ``evaluation`` stays within ``limit`` of that of ``dense``, measured as `snpc sweep` does.

    Raises UserError for less than 0, and without labels.
    """

    limit: float
    dense: Path
    evaluation: EvaluationData = field(repr=False)

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UserError(f"accuracy drop {self.limit:g}: must be 0 or more, as a share (0.01: one in a hundred)")
        if self.evaluation.labels is None:
            raise UserError("accuracy is measured with labels: give some")

    @cached_property
    def dense_accuracy(self) -> float:
        return self.accuracy(self.dense)

    @property
    def fingerprint(self) -> str:
        labels = self.evaluation.labels
        assert labels is not None
        label_digest = hashlib.sha256(repr(labels.shape).encode() + labels.tobytes()).hexdigest()
        return run_fingerprint(self.evaluation.data, self.limit, label_digest)

    def accuracy(self, path: Path) -> float:
        """The share of correct answers of a file."""
        return task_score(path, self.evaluation).value

    def measure(self, result: FinetuneResult) -> float:
        return self.dense_accuracy - self.accuracy(result.path)

    def __str__(self) -> str:
        return f"the accuracy within {self.limit:g} of the dense model's {self.dense_accuracy:.4g}"


def max_output_drift(result: FinetuneResult) -> float:
    """The largest drift of an output from the dense model's, after training."""
    return result.after.drift
