"""Which metric suits each output of a model: by what the graph does at its end, by values, or as the user says.

The graph says most (``snpc.passes.output_kinds``). Values of the original say the rest, once: rows that add up to one
are probabilities, logarithms of such are log-probabilities, rows of length one are compared by cosine. A linear layer
with a bias at the end of the graph is taken for logits where its values are those of a trained classifier:
``looks_like_logits``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import ShapeFacts, choose_dim_sizes
from snpc.passes import Analysis, OutputKind, find_output_kinds
from snpc.runtime.evaluation.distances import OutputMetric, as_float, log_probabilities
from snpc.runtime.evaluation.perplexity import LanguageJudge
from snpc.types import AnyArray, BoolArray, ChosenMetric, Difference, FloatArray, Model

ROW_TOLERANCE = 1e-3  # by how much rows of float16 miss a sum of one
CONFIDENCE = 0.25  # mean share of the top class, from which on a softmax over a linear layer means something
CENTER_TOLERANCE = 0.5  # logits are centered: cross entropy does not see their mean, so training leaves it near zero
SAMPLE_ROWS = 4096  # rows that are looked at
NOT_NUMBERS = "biuOSU"  # kinds of numpy types that are not floating point


@dataclass(frozen=True)
class OutputMetrics:
    """The metric of every output. Outputs that are not in ``by_output`` are compared by relative change. ``final``:
    values were looked at, too. ``limited``: ``change`` is in units of the drift. ``language``: of a causal language
    model."""

    by_output: Mapping[str, OutputMetric] = field(default_factory=dict)
    final: bool = False
    limited: bool = False
    language: LanguageJudge | None = field(default=None, compare=False)

    @classmethod
    def of(cls, analysis: Analysis) -> OutputMetrics:
        """By the user's choice, or what the graph does at its end; ``for_values`` looks at values too."""
        source = analysis.traced_graph
        return cls.of_graph(analysis.model, source.model, source.facts).with_choice(analysis.metrics)

    @classmethod
    def of_model(cls, model: Model) -> OutputMetrics:
        """``of``, for a model that is not analyzed."""
        return cls.of_graph(model, model.graph, choose_dim_sizes(model.graph)[1])

    @classmethod
    def of_graph(cls, model: Model, graph: ir.Model, facts: ShapeFacts) -> OutputMetrics:
        kinds = find_output_kinds(graph, facts)
        metrics = {spec.name: metric_of_kind(kinds[spec.name], spec.dtype) for spec in model.outputs}
        return cls(metrics).with_integers_alone()

    def with_integers_alone(self) -> OutputMetrics:
        """Integers are judged where there is nothing else."""
        if any(metric.judged for metric in self.by_output.values()):
            return self
        why = "integers, and no other output"
        replaced = {
            name: replace(metric, name="mismatch", why=why) if metric.candidate == "integers" else metric
            for name, metric in self.by_output.items()
        }
        return replace(self, by_output=replaced)

    def with_choice(self, choice: Mapping[str, ChosenMetric]) -> OutputMetrics:
        """The same with the user's metrics, by output; "" is for all outputs that are judged."""
        chosen = dict(self.by_output)
        for name, metric in self.by_output.items():
            wanted = choice.get(name) or (choice.get("") if metric.judged else None)
            if wanted is not None:
                chosen[name] = chosen_metric(name, metric, wanted)
        return replace(self, by_output=chosen)

    def __getitem__(self, output: str) -> OutputMetric:
        return self.by_output.get(output, RELATIVE)

    @property
    def drift_exponent(self) -> float:
        """The drift is so high a power of the ``change`` of metrics that are ``limited``."""
        return 1.0 if any(m.chosen and m.name != "relative" for m in self.by_output.values()) else 0.5

    @property
    def drift_unit(self) -> str:
        """What the drift is, in words: "relative", or the user's metrics."""
        chosen = {metric.name for metric in self.by_output.values() if metric.chosen and metric.judged}
        return "relative" if chosen <= {"relative"} else f"by {', '.join(sorted(chosen))}"

    def for_values(self, outputs: Mapping[str, AnyArray]) -> OutputMetrics:
        """Refined, once, by values of the original. Raises UserError where an output that is judged has no finite
        entry, or a function of the user fails."""
        if self.final:
            return self
        refined = {name: metric_of_values(name, self[name], array) for name, array in outputs.items()}
        return replace(self, by_output={**self.by_output, **refined}, final=True)

    def for_limit(self) -> OutputMetrics:
        """For planning within a limit of the drift: the quantity that is limited. Of metrics that are ``final``."""
        assert self.final
        limited = {
            name: replace(metric, name="relative", function=None) if metric.judged and not metric.chosen else metric
            for name, metric in self.by_output.items()
        }
        return replace(self, by_output=limited, limited=True)

    def change(
        self,
        reference: Mapping[str, AnyArray],
        other: Mapping[str, AnyArray],
        masks: Mapping[str, BoolArray] | None = None,
    ) -> float:
        """Mean over the judged outputs of their ``OutputMetric.change``; infinite where one is not finite any more.
        ``masks``: the rows that count, by output."""
        metrics, masks = self.for_values(reference), masks or {}
        changes = []
        for name, metric in ((name, metrics[name]) for name in other if metrics[name].judged):
            measure = metric.distance if self.limited and metric.name != "relative" else metric.change
            changes.append(measure(reference[name], other[name], masks.get(name)))
        return float(np.mean(changes)) if changes else 0.0

    def to_json(self) -> dict[str, dict[str, str]]:
        """Output -> its metric, and why."""
        return {name: {"metric": metric.name, "why": metric.why} for name, metric in self.by_output.items()}


RELATIVE = OutputMetric("relative")
RELATIVE_METRICS = OutputMetrics(final=True)
"""All outputs by relative change, whatever they are: for checks that two models compute the same."""


def metric_of_kind(kind: OutputKind, dtype: np.dtype[Any]) -> OutputMetric:
    if dtype.kind in NOT_NUMBERS:
        return OutputMetric("none", why="integers", candidate="integers")
    if kind.content == "cache":
        return OutputMetric("none", why=kind.why)
    if kind.content == "values":
        return RELATIVE
    if kind.content == "linear":
        return replace(RELATIVE, candidate="linear")
    return OutputMetric("kl", kind.content, kind.axis, kind.why)


def chosen_metric(name: str, found: OutputMetric, wanted: ChosenMetric) -> OutputMetric:
    """What the user wants of an output. Raises UserError for classes of integers."""
    if found.candidate == "integers" and wanted.name not in ("mismatch", "none") and wanted.function is None:
        raise UserError(f"--metric {name}={wanted.name}: the output holds integers; they have mismatch or none")
    metric = replace(found, name=wanted.name, why="as asked", function=wanted.function, chosen=True)
    if wanted.axis is not None:
        metric = replace(metric, axis=wanted.axis)
    return metric if metric.domain != "values" else replace(metric, candidate="classes")


# -- by values -------------------------------------------------------------------------------------------------------


def metric_of_values(name: str, metric: OutputMetric, array: AnyArray) -> OutputMetric:
    """``metric``, or another one if these values of the original call for it."""
    if not metric.judged or array.dtype.kind in NOT_NUMBERS or not array.size:
        return metric
    if not np.isfinite(as_float(array)).any():
        raise UserError(f"output {name}: the original has no finite value on this data, so no change can be measured")
    if metric.chosen:
        return chosen_for_values(name, metric, array)
    if metric.name == "kl":
        few = array.ndim < -metric.axis or array.shape[metric.axis] < 2
        return replace(RELATIVE, why="one class") if few else metric
    for axis in class_axes(array):
        rows = sample_rows(array, axis)
        domain = normalized_domain(rows)
        if domain is not None:
            return OutputMetric("kl", domain, axis, f"its {AXIS_WORDS[axis == -1]} add up to one")
    if array.ndim >= 2 and array.shape[-1] > 1:
        rows = sample_rows(array, -1)
        if len(rows) and is_one(np.linalg.norm(rows, axis=-1)):
            return OutputMetric("cosine", why="its rows have length one")
        if metric.candidate == "linear" and looks_like_logits(rows):
            return OutputMetric("kl", "logits", why="a linear layer with the values of a classifier")
    return metric


AXIS_WORDS = {True: "rows", False: "entries along axis 1"}


def class_axes(array: AnyArray) -> list[int]:
    """Axes that may be those of classes, from the end: the last one, and axis 1 of pictures."""
    axes = [-1] if array.ndim >= 2 else []
    return [axis for axis in (*axes, *([1 - array.ndim] if array.ndim >= 3 else [])) if array.shape[axis] > 1]


def chosen_for_values(name: str, metric: OutputMetric, array: AnyArray) -> OutputMetric:
    """The user's metric for an output with these values."""
    axis = metric.axis if metric.axis < 0 else metric.axis - array.ndim
    if array.ndim < -axis or axis >= 0:
        raise UserError(f"--metric {name}={metric.name}:{metric.axis}: the output has {array.ndim} axes")
    metric = replace(metric, axis=axis)
    if metric.name == "kl":
        if array.shape[axis] < 2:
            raise UserError(
                f"--metric {name}=kl: axis {array.ndim + axis} of the output has one entry, so there are no classes"
            )
        if metric.candidate == "classes":
            metric = replace(metric, domain=normalized_domain(sample_rows(array, axis)) or "logits")
    if metric.function is not None and not metric.distance(array, array) <= SAME_TOLERANCE:
        raise UserError(f"--metric {metric.name}: gives {metric.distance(array, array):.3g} for equal outputs, not 0")
    return metric


SAME_TOLERANCE = 1e-6


def sample_rows(array: AnyArray, axis: int) -> FloatArray:
    """[rows, classes]: finite rows, evenly taken."""
    rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    rows = rows[:: max(1, len(rows) // SAMPLE_ROWS)].astype(np.float64)
    return np.asarray(rows[np.isfinite(rows).all(-1)])


def normalized_domain(rows: FloatArray) -> Literal["probabilities", "log_probabilities"] | None:
    """Whether the rows add up to one, or their exponentials do."""
    if len(rows) and (rows >= 0).all() and is_one(rows.sum(-1)):
        return "probabilities"
    if len(rows) and (rows <= ROW_TOLERANCE).all() and is_one(np.exp(rows).sum(-1)):
        return "log_probabilities"
    return None


def is_one(sums: FloatArray) -> bool:
    return bool((np.abs(sums - 1) < ROW_TOLERANCE).all())


def looks_like_logits(rows: FloatArray) -> bool:
    """Does a softmax of the rows say something, and are they centered? Regression and embeddings are seldom both."""
    if not len(rows):
        return False
    top = np.exp(log_probabilities("logits", rows, np.isfinite(rows)).max(-1))
    center, spread = np.abs(rows.mean(-1)).mean(), rows.std(-1).mean()
    return bool(top.mean() >= CONFIDENCE and center < CENTER_TOLERANCE * spread)


def max_drift(differences: Sequence[Difference]) -> float:
    """The largest drift of an output that is judged: what ``--max-drift`` limits."""
    return max((d.drift for d in differences), default=0.0)
