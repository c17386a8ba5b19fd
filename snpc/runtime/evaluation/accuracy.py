"""Accuracy of a model file on labeled inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, open_runner
from snpc.types import AnyArray


@dataclass(frozen=True)
class EvaluationData:
    """Inputs to evaluate on, in any form of calibration data, and labels [samples, ...] where there are some."""

    data: Calibration
    labels: AnyArray | None = None


def collect_outputs(
    path: Path, evaluation: EvaluationData, execution: Execution = DEFAULT_EXECUTION
) -> list[dict[str, AnyArray]]:
    """Outputs of a model or artifact by name, a dict per batch."""
    runner = open_runner(path, execution=execution, memory="lean")
    batches = execution.track("evaluation", evaluation.data.batches(), len(evaluation.data.batch_plan))
    return [runner.run(feeds) for feeds in batches]


def top1_accuracy(batches: Sequence[dict[str, AnyArray]], labels: AnyArray | None) -> float | None:
    """Share of ``labels`` that are the largest entry of the first output; None without labels."""
    if labels is None:
        return None
    predictions = np.concatenate([next(iter(batch.values())).argmax(-1) for batch in batches])
    if predictions.shape != labels.shape:
        raise UserError(
            f"labels have the shape {list(labels.shape)}, the outputs' top entries {list(predictions.shape)}"
        )
    return float((predictions == labels).mean())
