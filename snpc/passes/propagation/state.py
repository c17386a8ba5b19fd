"""What the trace carries from value to value, and where it writes what it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.ops.spec import Labels, Letters, OpCall, OpSpec
from snpc.passes.propagation.labels import LabelTable, varying_axes
from snpc.types import PinKind, Shape

Factors = tuple[Labels, ...]


@dataclass(frozen=True)
class LabeledValue:
    """What the trace knows of one value: its shape, the labels on it, and whether it is made of constants only."""

    name: str
    shape: Shape
    factors: Factors = ()
    constant: bool = False
    unlabeled_reason: str = ""
    """Why nothing is known of it, where an operator that snpc does not look through made it."""
    projected: bool = False
    """Constant, but a product made it: a decoder's learnt queries, times a weight."""


@dataclass(frozen=True)
class Contraction:
    """One sum of products, as the cost, the scale and the probes need it."""

    node: ir.Node
    letters: Letters
    left: LabeledValue
    right: LabeledValue
    has_weight: bool
    """One operand is a weight; otherwise both are activations."""
    part: str = ""


@dataclass
class Trace:
    """Labels of every value of the main graph, and the book of what they mean."""

    table: LabelTable = field(default_factory=LabelTable)
    values: dict[ir.Value, LabeledValue] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    inner_values: dict[tuple[ir.Node, str], LabeledValue] = field(default_factory=dict)
    statistics: list[NormalizationStatistic] = field(default_factory=list)
    caches: dict[ir.Value, Labels] = field(default_factory=dict)


@dataclass(frozen=True)
class NormalizationStatistic:
    """Means are taken over ``labels`` of ``data``, along ``axes`` counted from the right."""

    context: NodeContext
    data: LabeledValue
    labels: Labels
    axes: tuple[int, ...]


@dataclass(frozen=True)
class NodeContext:
    """The node that is being traced, for pins."""

    node: ir.Node
    call: OpCall
    spec: OpSpec
    trace: Trace

    @property
    def operator(self) -> str:
        return f"{self.node.op_type} {self.node.name}"

    def pin(
        self, carried: LabeledValue, labels: Labels, reason: str, axis: int | None = None, kind: PinKind = "hard"
    ) -> None:
        axes = sorted(varying_axes(labels)) or [0]
        at = axes[0] if axis is None else axis
        size = carried.shape[at] if at < len(carried.shape) else 1
        self.trace.table.pin(labels, carried.name, at, size, reason, self.operator, kind)

    def pin_statistics(
        self, carried: LabeledValue, labels: Labels, axes: frozenset[int], reason: str, kind: PinKind | None = None
    ) -> None:
        """Statistics are taken along ``axes``: one pin for what goes into each, so that a statistic of one head can be
        told from one of all heads."""
        kind = kind or self.spec.pins
        if kind == "norm" and carried.constant:
            kind = "hard"
        elif kind == "norm" and len(varying_axes(labels)) > 1:
            kind = "sum"  # one of several statistics, each over its own part of the positions
        if kind == "norm":
            statistic = NormalizationStatistic(self, carried, labels, tuple(k - labels.ndim for k in sorted(axes)))
            self.trace.statistics.append(statistic)
        rest = [k for k in range(labels.ndim) if k not in axes]
        rows = labels.transpose([*rest, *sorted(axes)]).reshape(-1, int(np.prod([labels.shape[k] for k in axes])))
        for row in np.unique(rows, axis=0):
            self.trace.table.pin(row, carried.name, min(axes), carried.shape[min(axes)], reason, self.operator, kind)

    def pin_all(self, inputs: Sequence[LabeledValue | None], reason: str) -> None:
        for carried in inputs:
            if carried is not None:
                for labels in carried.factors:
                    self.pin(carried, labels, reason)

    @staticmethod
    def describe_unlabeled(carried: LabeledValue) -> str:
        """An unlabelled tensor, in words."""
        return f"{carried.name}, which no float weight makes" + (
            f" ({carried.unlabeled_reason})" if carried.unlabeled_reason else ""
        )

    def refuse(self, inputs: Sequence[LabeledValue | None], reason: str) -> list[Factors]:
        """Pin everything that enters; nothing comes out labelled."""
        self.pin_all(inputs, reason)
        return []


def prepend_axes(labels: Labels, rank: int) -> Labels:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def drop_determined_factors(factors: Factors) -> Factors:
    """Without the factors that a finer one on the same axes determines (heads beneath heads x width, flattened).

    Nothing is lost: what the coarser labels cover was written down where the two first met.
    """
    kept: list[Labels] = []
    for labels in sorted(factors, key=lambda f: -len(np.unique(f))):
        if not any(varying_axes(labels) == varying_axes(fine) and determines(fine, labels) for fine in kept):
            kept.append(labels)
    return tuple(kept)


def determines(fine: Labels, coarse: Labels) -> bool:
    a, b = np.broadcast_arrays(fine, coarse)
    return len(np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1).T) == len(np.unique(a))


def cover_remaining_axes(here: NodeContext, labels: Labels, rest: frozenset[int]) -> Labels:
    """Fresh labels for what remains of ``labels`` when the other axes are summed: one per head, say.

    Positions that sum over the same labels get the same one (an axis may hold batch x heads).
    """
    order = [*sorted(rest), *(k for k in range(labels.ndim) if k not in rest)]
    count = int(np.prod([labels.shape[k] for k in rest], dtype=np.int64))
    rows = np.sort(labels.transpose(order).reshape(count, -1), axis=1)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    turn = np.argsort(np.argsort(first))[inverse.reshape(-1)]  # numbered as they occur
    shape = [n if k in rest else 1 for k, n in enumerate(labels.shape)]
    coarse = here.trace.table.allocate(len(first))[turn].reshape(shape)
    here.trace.table.cover(coarse, labels, "batch")
    return coarse
