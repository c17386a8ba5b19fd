"""The user's metrics: by name, by output, or as a function in a Python file.

kl                      for all outputs that are judged
logits=kl               for one output
logits=kl:1             its classes lie along axis 1
quality.py:distance     a function: (original, pruned) arrays of one output -> a distance, or one per sample
boxes=quality.py:iou    the same for one output
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.runtime.calibration import load_script_function
from snpc.runtime.evaluation.distances import METRIC_NAMES
from snpc.runtime.evaluation.metrics import OutputMetrics
from snpc.runtime.evaluation.task_metrics import TASK_METRICS
from snpc.types import ChosenMetric, MetricFunction

MetricRequest = str | MetricFunction | Mapping[str, str | MetricFunction] | Sequence[str]
RETURNS = "it should take the original's and the pruned model's array of one output and return a number from 0 on"


def with_metrics(analysis: Analysis, metric: MetricRequest | None) -> Analysis:
    """The analysis, with outputs judged as ``metric`` says: a text of the form above, a function, several texts, or a
    mapping of outputs to these. None: as it was.

    Raises UserError for an unknown name or output, and for a file that has no such function. Files are run.
    """
    if metric is None:
        return analysis
    outputs = [spec.name for spec in analysis.model.outputs]
    chosen: dict[str, ChosenMetric] = {}
    for output, wanted in requested_metrics(metric, outputs):
        if output and output not in outputs:
            raise UserError(f"--metric: the model has no output {output!r}; it has {', '.join(outputs)}")
        if output in chosen:
            raise UserError(f"--metric: given twice for {output or 'all outputs'}; keep one")
        chosen[output] = parse_metric(wanted) if isinstance(wanted, str) else function_metric(wanted)
    result = replace(analysis, metrics={**analysis.metrics, **chosen})
    if not any(found.judged for found in OutputMetrics.of(result).by_output.values()):
        raise UserError("--metric: leaves no output that is judged")
    return result


def with_named_metrics(analysis: Analysis, texts: Sequence[str]) -> Analysis:
    """``with_metrics`` for texts that a file holds: no code is run."""
    for _, name in (split_output(text, [spec.name for spec in analysis.model.outputs]) for text in texts):
        if not is_metric_name(name):
            raise UserError(f"metric {name!r} of the plan: choose from {', '.join(METRIC_NAMES)}")
    return with_metrics(analysis, texts or None)


def metrics_identity(analysis: Analysis) -> list[tuple[str, str, int | None, object]]:
    """What tells the user's metrics from others: output, name, axis, and the code of a function's file. A function of
    the caller stands for itself: no digest can be made of it."""
    return [(output, metric.name, metric.axis, function_source(metric)) for output, metric in analysis.metrics.items()]


def function_source(metric: ChosenMetric) -> object:
    script = Path(metric.name.rpartition(":")[0])
    return script.read_bytes() if metric.function is not None and script.is_file() else metric.function


def requested_metrics(metric: MetricRequest, outputs: Sequence[str]) -> Iterator[tuple[str, str | MetricFunction]]:
    """(output or "", what is wanted of it) of every part of a request."""
    if isinstance(metric, Mapping):
        yield from metric.items()
    elif callable(metric):
        yield "", metric
    elif isinstance(metric, str):
        yield split_output(metric, outputs)
    else:
        yield from (split_output(text, outputs) for text in metric)


def split_output(text: str, outputs: Sequence[str]) -> tuple[str, str]:
    """``OUTPUT=NAME`` -> (output, name). Names of outputs and of files may hold "=" themselves."""
    for place in [k for k, letter in enumerate(text) if letter == "="]:
        if text[:place] in outputs:
            return text[:place], text[place + 1 :]
    if "=" in text and not Path(text.rpartition(":")[0]).is_file():
        output, _, name = text.rpartition("=")
        return output, name
    return "", text


def is_metric_name(text: str) -> bool:
    """Is it a name, perhaps with an axis?"""
    return re.fullmatch(rf"({'|'.join(METRIC_NAMES)})(:-?\d{{1,2}})?", text.strip(), re.ASCII) is not None


def parse_metric(text: str) -> ChosenMetric:
    """A name with its axis, or the function of a file."""
    if is_metric_name(text):
        name, _, axis = text.strip().partition(":")
        return ChosenMetric(name, int(axis) if axis else None)
    script, colon, function = text.rpartition(":")
    if not colon or not script.endswith(".py"):
        raise UserError(
            f"--metric {text!r}: choose from {', '.join(METRIC_NAMES)}, or give FILE.py:FUNCTION; on labels "
            f"{', '.join(TASK_METRICS)}"
        )
    return ChosenMetric(text, function=load_script_function(Path(script), function, RETURNS))


def function_metric(function: Callable[..., Any]) -> ChosenMetric:
    """A function of the caller. Its errors are the caller's own."""
    return ChosenMetric(getattr(function, "__name__", type(function).__name__), function=function)
