"""State of label propagation: the labels on each value, the node being visited, and everything recorded so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.ops import Labels, Letters, OpCall, OpSpec
from snpc.passes.propagation.labels import LabelTable, varying_axes
from snpc.types import PinKind, Shape

Factors = tuple[Labels, ...]


@dataclass(frozen=True)
class Routing:
    """What a value says of the experts that tokens are sent to.

    ``chosen``: [experts] labels of the positions that its integer entries name, as the indices of TopK do; None for
    other values. ``one_hot``: it has rows over the experts with one entry. ``expert``: label of the one expert whose
    tokens it marks or names; -1 for none.
    """

    chosen: Labels | None = None
    one_hot: bool = False
    expert: int = -1


NOT_ROUTED = Routing()


@dataclass(frozen=True)
class LabeledValue:
    """Labels of one value of the graph.

    ``factors``: label arrays that broadcast to ``shape``, each of the value's rank (size 1 on axes that its labels do
    not vary on) with -1 where a position has no label. ``constant``: computed from constants only.
    """

    name: str
    shape: Shape
    factors: Factors = ()
    constant: bool = False
    unlabeled_reason: str = ""
    """Why the value has no labels, where an unsupported operator produced it."""
    projected: bool = False
    """Constant, but the result of a product, such as learned queries of a decoder times a weight."""
    products: frozenset[str] = frozenset()
    """The products whose results it is made of, element by element."""
    is_sum: bool = False
    """Made of sums of results of different products, as a residual stream is."""
    routing: Routing = NOT_ROUTED
    copies: Factors = ()
    """Label arrays along axes whose positions are copies of one, see ``copies``. They are no factors yet."""


def labels_fit(value: LabeledValue) -> bool:
    """Whether the labels of a value broadcast to its shape; in a damaged graph the two may come from other inputs."""
    return all(
        len(labels.shape) == len(value.shape)
        and all(n in (1, m) for n, m in zip(labels.shape, value.shape, strict=True))
        for labels in value.factors
    )


@dataclass(frozen=True)
class Contraction:
    """One sum of products over two operands, as cost, attention scale and probes read it.

    ``part`` names the product inside a fused node ("projection", "scores", "context"); it is "" otherwise.
    """

    node: ir.Node
    letters: Letters
    left: LabeledValue
    right: LabeledValue
    has_weight: bool
    """One operand is a weight; otherwise both are activations."""
    part: str = ""


@dataclass
class Trace:
    """Result of label propagation over the main graph.

    ``table``: all labels and what is known of them; ``inner_values``: values inside fused nodes, by node and name;
    ``caches``: labels of KV cache inputs.
    """

    table: LabelTable = field(default_factory=LabelTable)
    values: dict[ir.Value, LabeledValue] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    inner_values: dict[tuple[ir.Node, str], LabeledValue] = field(default_factory=dict)
    statistics: list[NormalizationStatistic] = field(default_factory=list)
    width_ties: list[WidthTie] = field(default_factory=list)
    caches: dict[ir.Value, Labels] = field(default_factory=dict)
    comparisons: list[RoutingComparison] = field(default_factory=list)
    expert_reads: dict[ir.Node, Labels] = field(default_factory=dict)
    """Nodes that read the weights of one expert for each token, with the [experts] labels of the router."""
    expert_outputs: dict[ir.Node, int] = field(default_factory=dict)
    """Nodes that add to some tokens what one expert makes of them, with the label of the expert."""


@dataclass(frozen=True)
class NormalizationStatistic:
    """A mean over the positions with ``labels`` of ``data``, along ``axes`` (negative: counted from the right)."""

    context: NodeContext
    data: LabeledValue
    labels: Labels
    axes: tuple[int, ...]


@dataclass(frozen=True)
class RoutingComparison:
    """Positions with ``labels`` of input ``operand`` of a node, of type ``dtype``, that are compared along ``axis``
    (negative: counted from the right). ``most``: how many of them are chosen, 0 where they get shares of a whole."""

    node: ir.Node
    labels: Labels
    axis: int
    dtype: ir.DataType
    most: int = 0
    operand: int = 0


@dataclass(frozen=True)
class NodeContext:
    """The node that is being visited, with its operator's entry, and the trace that its pins are written to."""

    node: ir.Node
    call: OpCall
    spec: OpSpec
    trace: Trace
    dtype: ir.DataType = ir.DataType.FLOAT
    """Type of the first input."""

    @property
    def operator(self) -> str:
        """Operator type and name of the node, as pins quote it."""
        return f"{self.node.op_type} {self.node.name}"

    def pin(
        self, operand: LabeledValue, labels: Labels, reason: str, axis: int | None = None, kind: PinKind = "hard"
    ) -> None:
        """Pin ``labels`` of an input along ``axis`` (None: the first axis that they vary on)."""
        axes = sorted(varying_axes(labels)) or [0]
        at = axes[0] if axis is None else axis
        size = operand.shape[at] if at < len(operand.shape) else 1
        self.trace.table.pin(labels, operand.name, at, size, reason, self.operator, kind)

    def pin_statistics(
        self, operand: LabeledValue, labels: Labels, axes: frozenset[int], reason: str, kind: PinKind | None = None
    ) -> None:
        """Pin labels over which statistics are taken along ``axes``.

        Each statistic gets its own pin, so that statistics of single heads differ from one of all heads."""
        kind = kind or self.spec.pins
        if kind == "norm" and operand.constant:
            kind = "hard"
        elif kind == "norm" and len(varying_axes(labels)) > 1:
            kind = "head_norm"  # one of several statistics, each over its own part of the positions
        if kind in ("norm", "head_norm"):
            statistic = NormalizationStatistic(self, operand, labels, tuple(k - labels.ndim for k in sorted(axes)))
            self.trace.statistics.append(statistic)
        rest = [k for k in range(labels.ndim) if k not in axes]
        rows = labels.transpose([*rest, *sorted(axes)]).reshape(-1, int(np.prod([labels.shape[k] for k in axes])))
        for row in np.unique(rows, axis=0):
            self.trace.table.pin(row, operand.name, min(axes), operand.shape[min(axes)], reason, self.operator, kind)

    def pin_all(self, inputs: Sequence[LabeledValue | None], reason: str) -> None:
        """Pin all labels of all inputs."""
        for operand in inputs:
            if operand is not None:
                for labels in (*operand.factors, *operand.copies):
                    self.pin(operand, labels, reason)

    @staticmethod
    def describe_unlabeled(operand: LabeledValue) -> str:
        """Names an unlabeled operand in a pin's reason."""
        return f"`{operand.name}`, which no float weight produces" + (
            f" ({operand.unlabeled_reason})" if operand.unlabeled_reason else ""
        )

    def refuse(self, inputs: Sequence[LabeledValue | None], reason: str) -> list[Factors]:
        """Pin all labels of the inputs; the outputs have none."""
        self.pin_all(inputs, reason)
        return []


@dataclass(frozen=True)
class WidthTie:
    """Keys and values of a fused node whose kernel takes one width for both, a multiple of ``multiple`` channels.

    ``key``, ``value``: [batch, heads, tokens, width]. ``steps``: [width], the first channel of the step of the kernel
    that each channel belongs to, where both must keep the same positions. ``every_layer``: the width is that of all
    nodes of the kind too, whose caches a runtime allocates alike.
    """

    context: NodeContext
    key: LabeledValue
    value: LabeledValue
    multiple: int
    steps: tuple[int, ...]
    every_layer: bool = False


def prepend_axes(labels: Labels, rank: int) -> Labels:
    """``labels`` with axes of size 1 in front, up to ``rank`` axes."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def drop_determined_factors(factors: Factors) -> Factors:
    """``factors`` without those that a finer factor on the same axes determines (heads, beside heads x width
    flattened).

    The label table already says which fine labels each coarse label covers, from where the two were first combined.
    """
    kept: list[Labels] = []
    for labels in sorted(factors, key=lambda f: -len(np.unique(f))):
        if not any(varying_axes(labels) == varying_axes(fine) and determines(fine, labels) for fine in kept):
            kept.append(labels)
    return tuple(kept)


def determines(fine: Labels, coarse: Labels) -> bool:
    """Whether positions with equal ``fine`` labels always have equal ``coarse`` labels."""
    a, b = np.broadcast_arrays(fine, coarse)
    return len(np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1).T) == len(np.unique(a))


def cover_remaining_axes(context: NodeContext, labels: Labels, rest: frozenset[int]) -> Labels:
    """New labels on the axes ``rest`` after all other axes of ``labels`` are summed (one label per head, for example).

    Each new label covers the labels that are summed at its position. Positions that sum over the same labels share a
    new label, because one axis may hold batch x heads.
    """
    order = [*sorted(rest), *(k for k in range(labels.ndim) if k not in rest)]
    count = int(np.prod([labels.shape[k] for k in rest], dtype=np.int64))
    rows = np.sort(labels.transpose(order).reshape(count, -1), axis=1)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order_of_row = np.argsort(np.argsort(first))[inverse.reshape(-1)]  # in order of first occurrence
    shape = [n if k in rest else 1 for k, n in enumerate(labels.shape)]
    coarse = context.trace.table.allocate(len(first))[order_of_row].reshape(shape)
    context.trace.table.cover(coarse, labels, "batch")
    return coarse
