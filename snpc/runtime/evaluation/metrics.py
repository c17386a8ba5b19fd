"""Distances of outputs: which one suits each output, and what it is.

- "kl": Kullback-Leibler divergence in nats, mean over rows, of the original's distribution over classes from the other;
  for logits, log-probabilities and probabilities. Log-probabilities need not add up to one (matchers have matrices of
  them): then it is the generalized divergence ``sum p log(p/q) - p + q``, so that rows without mass do not count.
- "relative": root mean square of the difference over that of the original; for heat maps, masks, boxes, regression.
  Of logits and log-probabilities, only what a softmax sees counts: see ``visible_values``.
- "cosine": one minus the cosine, mean over rows; for embeddings of length one.
- "mismatch": share of entries that differ; for integers, where a model has no other output.
- "none": not judged: KV caches, and integers beside other outputs.
- any other name: a function of the user.

All distances are over entries that are finite in both. A value that is finite in one only is an infinite distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, choose_dim_sizes
from snpc.passes import Analysis, OutputKind, find_output_kinds
from snpc.types import AnyArray, BoolArray, Difference, FloatArray, Model

MetricFunction = Callable[[AnyArray, AnyArray], Any]
Domain = Literal["probabilities", "log_probabilities", "logits", "values"]

ROW_TOLERANCE = 1e-3  # by how much rows of float16 miss a sum of one
INVISIBLE = 1e3  # a logit so far below the largest of its row has no probability at any precision: a mask
METRIC_NAMES = ("kl", "relative", "cosine", "mismatch", "none")


@dataclass(frozen=True)
class OutputMetric:
    """How one output is judged.

    ``name``: one of ``METRIC_NAMES``, or that of ``function``. ``domain``, ``axis``: what its values are, and the axis
    of the classes. ``why``: for reports. ``chosen``: by the user.
    """

    name: str
    domain: Domain = "values"
    axis: int = -1
    why: str = ""
    function: MetricFunction | None = field(default=None, compare=False)
    chosen: bool = False

    @property
    def judged(self) -> bool:
        return self.name != "none"

    def distance(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> float:
        """Distance of ``other`` from ``reference``, 0 where they are equal. ``mask`` [batch, rows]: rows that count."""
        total = self.sums(reference, other, mask)
        if self.name == "relative":
            return float(np.sqrt(total.distance / max(total.scale, 1e-300)))
        return total.distance / max(total.rows, 1)

    def change(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> float:
        """The distance for planning: like a squared error, and as a share of the distance of an output that is zero
        (of classes: of equal probabilities), so that several outputs can be averaged."""
        total = self.sums(reference, other, mask)
        if self.name in ("relative", "kl"):
            return total.distance / max(total.scale, 1e-300)
        return total.distance / max(total.rows, 1)

    def relative_change(self, reference: AnyArray, other: AnyArray) -> float:
        """The distance by "relative", of the same values."""
        return replace(self, name="relative", function=None).distance(reference, other)

    def sums(self, reference: AnyArray, other: AnyArray, mask: BoolArray | None = None) -> DistanceSums:
        """Sums over samples, taken one by one, since logits over a vocabulary are big."""
        if not same_finiteness(reference, other):
            return DistanceSums(np.inf, 1.0, 1)
        if self.function is not None:
            values = np.asarray(self.function(reference, other), np.float64).reshape(-1)
            return DistanceSums(float(values.sum()), 1.0, values.size)
        total = DistanceSums(0.0, 0.0, 0)
        for x, y in sample_pairs(reference, other, mask):
            total += self.of_sample(x, y)
        return total

    def of_sample(self, x: FloatArray, y: FloatArray) -> DistanceSums:
        """Of one sample, or of its rows that count."""
        if self.name == "kl":
            return divergence(self.domain, *class_rows(x, y, self.axis))
        if self.name == "cosine":
            return cosine_distance(*class_rows(x, y, self.axis))
        if self.name == "mismatch":
            return DistanceSums(float(np.sum(x != y)), 1.0, x.size)
        a, b = self.visible_values(x, y)
        return DistanceSums(float(np.sum((a - b) ** 2)), float(np.sum(a**2)), a.size)

    def visible_values(self, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What "relative" compares: the values; of log-probabilities the probabilities; of logits those that are not
        masked. Entries that are not finite are zero in both."""
        finite = np.isfinite(x) & np.isfinite(y)
        if self.domain == "log_probabilities":
            return tuple(np.where(finite, np.exp(np.where(finite, a, 0.0)), 0.0) for a in (x, y))  # type: ignore[return-value]
        if self.domain == "logits" and x.ndim:
            finite &= ~(masked_logits(x, self.axis) & masked_logits(y, self.axis))
        return np.where(finite, x, 0.0), np.where(finite, y, 0.0)


@dataclass(frozen=True)
class DistanceSums:
    """``distance`` summed over ``rows`` (or entries), and ``scale``: that of an output which is zero."""

    distance: float
    scale: float
    rows: int

    def __add__(self, other: DistanceSums) -> DistanceSums:
        return DistanceSums(self.distance + other.distance, self.scale + other.scale, self.rows + other.rows)


def same_finiteness(reference: AnyArray, other: AnyArray) -> bool:
    """Are NaN and either infinity at the same entries? True for what has no such values."""
    if reference.dtype.kind in "biuOSU" or other.dtype.kind in "biuOSU":
        return True
    x, y = (a if a.dtype.kind == "f" else a.astype(np.float32) for a in (reference, other))
    if np.isfinite(x).all() and np.isfinite(y).all():
        return True
    return all(np.array_equal(test(x), test(y)) for test in (np.isnan, np.isposinf, np.isneginf))


def sample_pairs(
    reference: AnyArray, other: AnyArray, mask: BoolArray | None
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Both arrays sample by sample as float64, without rows that ``mask`` does not have."""
    arrays = (np.atleast_1d(reference), np.atleast_1d(other))
    for k in range(len(arrays[0])):
        x, y = (np.asarray(a[k] if mask is None else a[k][mask[k]], np.float64) for a in arrays)
        yield x, y


def class_rows(x: FloatArray, y: FloatArray, axis: int) -> tuple[FloatArray, FloatArray]:
    """[rows, classes] of both."""
    if x.ndim == 0:
        return x.reshape(1, 1), y.reshape(1, 1)
    return tuple(np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in (x, y))  # type: ignore[return-value]


def divergence(domain: Domain, x: FloatArray, y: FloatArray) -> DistanceSums:
    """Kullback-Leibler divergence of rows ``x`` from rows ``y``; ``scale``: of equal probabilities from ``x``."""
    finite = np.isfinite(x) & np.isfinite(y)
    counts = finite.sum(-1)
    rows = counts > 0
    log_p, log_q = (log_probabilities(domain, a[rows], finite[rows]) for a in (x, y))
    p, q = np.exp(log_p), np.exp(log_q)
    surplus = q.sum(-1) - p.sum(-1)
    gap = np.subtract(log_p, log_q, out=np.zeros_like(p), where=p > 0)
    distances = np.sum(p * gap, -1) + surplus
    mass = p.sum(-1)
    log_share = np.log(np.maximum(mass, 1e-300)) - np.log(counts[rows])
    from_equal = np.sum(p * np.subtract(log_p, log_share[:, None], out=np.zeros_like(p), where=p > 0), -1)
    return DistanceSums(float(np.maximum(distances, 0).sum()), float(np.maximum(from_equal, 0).sum()), int(rows.sum()))


def log_probabilities(domain: Domain, rows: FloatArray, finite: BoolArray) -> FloatArray:
    """Logarithms of the probabilities that ``rows`` are; -inf where they are not finite.

    Log-probabilities stay as they are. A probability of zero counts as the least one that float32 has.
    """
    if domain == "log_probabilities":
        return np.where(finite, np.minimum(rows, LARGEST_LOGARITHM), -np.inf)
    if domain == "probabilities":
        clipped = np.where(finite, np.maximum(rows, SMALLEST_PROBABILITY), 0.0)
        total = clipped.sum(-1, keepdims=True)
        return np.where(finite, np.log(np.where(finite, clipped, 1.0)) - np.log(total), -np.inf)
    logits = np.where(finite, rows, -np.inf)
    shifted: FloatArray = logits - logits.max(-1, keepdims=True)
    normalized: FloatArray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


LARGEST_LOGARITHM = 100.0  # of what is called a log-probability: a broken model may have any, and must not overflow
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


def cosine_distance(x: FloatArray, y: FloatArray) -> DistanceSums:
    """One minus the cosine of every row; 1 where one of the two is zero, 0 where both are."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
    norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    product = norms[0] * norms[1]
    cosines = np.divide(np.sum(x * y, -1), product, out=np.zeros_like(product), where=product > 0)
    cosines[(norms[0] == 0) & (norms[1] == 0)] = 1.0
    return DistanceSums(float(np.sum(np.maximum(1 - cosines, 0))), float(len(x)), len(x))


def masked_logits(rows: FloatArray, axis: int) -> BoolArray:
    """Entries that no softmax sees."""
    finite = np.where(np.isfinite(rows), rows, -np.inf)
    largest = finite.max(axis, keepdims=True, initial=-np.inf)
    return np.asarray(finite < np.where(np.isfinite(largest), largest, 0.0) - INVISIBLE)


# -- which metric ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputMetrics:
    """The metric of every output. Outputs that are not in ``by_output`` are compared by relative change. ``final``:
    values were looked at, too."""

    by_output: Mapping[str, OutputMetric] = field(default_factory=dict)
    final: bool = False

    @classmethod
    def of(cls, analysis: Analysis) -> OutputMetrics:
        """By what the graph does at its end (``snpc.passes.output_kinds``); ``for_values`` looks at values too."""
        return cls.of_graph(analysis.model, analysis.traced_graph.model, analysis.traced_graph.facts)

    @classmethod
    def of_model(cls, model: Model) -> OutputMetrics:
        """``of``, for a model that is not analyzed."""
        return cls.of_graph(model, model.graph, choose_dim_sizes(model.graph)[1])

    @classmethod
    def of_graph(cls, model: Model, graph: ir.Model, facts: ShapeFacts) -> OutputMetrics:
        kinds = find_output_kinds(graph, facts)
        dtypes = {spec.name: spec.dtype for spec in model.outputs}
        metrics = {
            name: metric_of_kind(kind, dtypes[name] if name in dtypes else np.dtype(np.float32))
            for name, kind in kinds.items()
        }
        return cls(metrics).with_integers_alone()

    def with_integers_alone(self) -> OutputMetrics:
        """Integers are judged where there is nothing else."""
        if any(metric.judged for metric in self.by_output.values()):
            return self
        why = "integers, and no other output"
        replaced = {
            name: replace(m, name="mismatch", why=why) if m.why == INTEGERS else m for name, m in self.by_output.items()
        }
        return replace(self, by_output=replaced)

    def __getitem__(self, output: str) -> OutputMetric:
        return self.by_output.get(output, RELATIVE)

    def for_values(self, outputs: Mapping[str, AnyArray]) -> OutputMetrics:
        """Refined, once, by values of the original: rows that add up to one, logarithms of such, rows of length one; a
        class axis of one entry leaves nothing to compare by classes."""
        if self.final:
            return self
        refined = {name: metric_of_values(self[name], array) for name, array in outputs.items()}
        return OutputMetrics({**self.by_output, **refined}, final=True)

    def change(
        self,
        reference: Mapping[str, AnyArray],
        other: Mapping[str, AnyArray],
        masks: Mapping[str, BoolArray] | None = None,
    ) -> float:
        """Mean over the judged outputs of their ``OutputMetric.change``; infinite where one is not finite any more.
        ``masks``: the rows that count, by output."""
        metrics, masks = self.for_values(reference), masks or {}
        changes = [
            metrics[name].change(reference[name], array, masks.get(name))
            for name, array in other.items()
            if metrics[name].judged
        ]
        return float(np.mean(changes)) if changes else 0.0


RELATIVE = OutputMetric("relative")
RELATIVE_METRICS = OutputMetrics(final=True)
"""All outputs by relative change, whatever they are: for checks that two models compute the same."""
INTEGERS = "integers"


def metric_of_kind(kind: OutputKind, dtype: np.dtype[Any]) -> OutputMetric:
    if dtype.kind in "biuOSU":
        return OutputMetric("none", why=INTEGERS)
    if kind.content == "cache":
        return OutputMetric("none", why=kind.why)
    if kind.content == "values":
        return RELATIVE
    return OutputMetric("kl", kind.content, kind.axis, kind.why)


def metric_of_values(metric: OutputMetric, array: AnyArray) -> OutputMetric:
    """``metric``, or another one if these values of the original call for it."""
    if metric.chosen or not metric.judged or array.dtype.kind in "biuOSU" or not array.size:
        return metric
    if metric.name == "kl":
        few = array.ndim < -metric.axis or array.shape[metric.axis] < 2
        return replace(RELATIVE, why="one class") if few else metric
    if array.ndim < 2 or array.shape[-1] < 2:
        return metric
    rows = np.asarray(array, np.float64).reshape(-1, array.shape[-1])
    if not np.isfinite(rows).all():
        rows = rows[np.isfinite(rows).all(-1)]
    if not len(rows):
        return metric
    if (rows >= 0).all() and is_one(rows.sum(-1)):
        return OutputMetric("kl", "probabilities", why="its rows add up to one")
    if (rows <= ROW_TOLERANCE).all() and is_one(np.exp(rows).sum(-1)):
        return OutputMetric("kl", "log_probabilities", why="the exponentials of its rows add up to one")
    if is_one(np.linalg.norm(rows, axis=-1)):
        return OutputMetric("cosine", why="its rows have length one")
    return metric


def is_one(sums: FloatArray) -> bool:
    return bool((np.abs(sums - 1) < ROW_TOLERANCE).all())


def max_drift(differences: Sequence[Difference]) -> float:
    """The largest drift of an output that is judged: what ``--max-drift`` limits."""
    return max((d.drift for d in differences), default=0.0)
