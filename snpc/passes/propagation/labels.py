"""The label table: all labels of a model and what propagation has found out about them.

A label is an integer that stands for one position along one axis of one constant. Pairs say which labels belong to one
unit, covers say that a coarse label (of a head) stands for a set of fine ones (its channels), flags record which
operators a label passed through, and pins say why a label cannot be removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.ops import Labels
from snpc.types import IntArray, PinKind


class LabelFlag(IntFlag):
    """What operators did to a label."""

    PRODUCED = 1  # output axis of a constant weight
    CONSUMED = 2  # contracted with a constant weight
    SCORED = 4  # contracted with another activation
    PASSED_THROUGH = 8  # kept by a product of two activations: a value channel of attention
    ADDED = 16  # added to another activation
    GATED = 32  # multiplied with another activation
    CONVOLVED = 64  # channel of a convolution that sees more than one position
    NONLINEAR = 128  # input of a nonlinear operator
    SCALED = 256  # multiplied by a constant that differs between positions
    WEIGHT_INPUT = 512  # input axis of a constant weight
    NORM_PARAMETER = 1024  # scale or bias of a normalization
    POINTWISE = 8192  # channel of a convolution that sees one position at a time
    DEPTHWISE = 16384  # channel of a convolution of its own
    BATCHED = 4096  # batch axis of a product of two activations: one product per position
    CACHED = 2048  # stored in a KV cache
    ROUTED = 32768  # an expert: data choose some of them for each token


@dataclass(frozen=True)
class LabeledAxis:
    """``axis`` of ``constant`` has the labels ``first_label .. first_label + size - 1``."""

    constant: ir.Value
    axis: int
    first_label: int
    size: int


@dataclass(frozen=True, eq=False)
class Cover:
    """Coarse labels stand for sets of fine ones: label ``coarse[i]`` covers the labels ``fine[i, :]``.

    ``kind``: "batch" where a product of two activations is computed once per coarse label (attention heads), "aligned"
    where both labels occur on the same positions.
    """

    coarse: IntArray
    fine: IntArray
    kind: Literal["batch", "aligned"]


@dataclass(frozen=True, eq=False)
class LabelPin:
    """Why ``labels`` cannot be removed: ``axis`` (of ``size`` entries) of ``tensor`` must keep its width at
    ``operator``."""

    labels: IntArray
    tensor: str
    axis: int
    size: int
    reason: str
    operator: str
    kind: PinKind


@dataclass
class LabelTable:
    """All labels ``0 .. count - 1``, with the axes they belong to, their flags and the relations between them."""

    count: int = 0
    axes: list[LabeledAxis] = field(default_factory=list)
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    covers: list[Cover] = field(default_factory=list)
    products: list[IntArray] = field(default_factory=list)
    """Per product of two activations, labels of one operand that all of its matrices share."""
    selections: list[IntArray] = field(default_factory=list)
    """Labels of the columns that are selected of a rotary table, per selection."""
    pins: list[LabelPin] = field(default_factory=list)
    flags: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(1024, np.int32))

    def allocate(self, size: int) -> Labels:
        """[size]: new labels."""
        first = self.count
        self.count += size
        if self.count > len(self.flags):
            self.flags = np.concatenate([self.flags, np.zeros(max(self.count, len(self.flags)), np.int32)])
        return np.arange(first, first + size, dtype=np.int32)

    def label_axis(self, constant: ir.Value, axis: int, size: int) -> Labels:
        """[size]: new labels for one axis of a constant."""
        labels = self.allocate(size)
        self.axes.append(LabeledAxis(constant, axis, int(labels[0]), size))
        return labels

    def label_selection(self, size: int) -> Labels:
        """[size]: new labels for the columns that are selected of a rotary table. They lie on no axis of a weight."""
        labels = self.allocate(size)
        self.selections.append(labels.astype(np.int64))
        return labels

    def unify(self, left: Labels, right: Labels) -> None:
        """Labels at the same position become one unit. Positions that are labeled on one side only are skipped: the
        caller pins them."""
        a, b = np.broadcast_arrays(left, right)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            pairs = np.unique(np.stack([a[both], b[both]], 1), axis=0).astype(np.int64)
            self.pairs.append((pairs[:, 0], pairs[:, 1]))

    def cover_in_common(self, left: Labels, right: Labels, kind: Literal["batch", "aligned"]) -> None:
        """Relate two factors that share some axes and have others of their own.

        One new label per position of the shared axes covers the labels of both (the rows and the columns of one score
        matrix, per head)."""
        common = varying_axes(left) & varying_axes(right)
        shape = [n if k in common else 1 for k, n in enumerate(left.shape)]
        coarse = self.allocate(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        self.cover(coarse, left, kind)
        self.cover(coarse, right, kind)

    def unify_or_cover(self, left: Labels, right: Labels) -> None:
        """Relate two factors on the same axes: unified position by position, or, where one is coarser (heads, beside
        heads x width on one flat axis), its labels cover those of the other."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(left, right))
        if (a < 0).any() or (b < 0).any():
            return self.unify(left, right)
        kinds = len(np.unique(a)), len(np.unique(b))
        combinations = len(np.unique(a.astype(np.int64) * self.count + b))
        coarse, fine = (a, b) if kinds[0] < kinds[1] else (b, a)
        if kinds[0] == kinds[1] or combinations != max(kinds):
            return self.unify(left, right)
        order = np.argsort(coarse, kind="stable")
        counts = np.unique(coarse[order], return_counts=True)[1]
        if (counts != counts[0]).any():
            return self.unify(left, right)
        rows = np.sort(fine[order].reshape(-1, counts[0]).astype(np.int64), axis=1)
        self.covers.append(Cover(np.unique(coarse).astype(np.int64), rows, "aligned"))
        return None

    def flag(self, labels: Labels, flag: LabelFlag) -> None:
        """Set ``flag`` on every label in ``labels``."""
        labeled = labels[labels >= 0]
        self.flags[labeled] |= int(flag)

    def pin(
        self, labels: Labels, tensor: str, axis: int, size: int, reason: str, operator: str, kind: PinKind = "hard"
    ) -> None:
        """Record why ``labels`` cannot be removed; nothing where none of the positions is labeled."""
        labeled = np.unique(labels[labels >= 0]).astype(np.int64)
        if len(labeled):
            self.pins.append(LabelPin(labeled, tensor, axis, size, reason, operator, kind))

    def pin_unlabeled(self, tensor: str, axis: int, size: int, reason: str, operator: str) -> None:
        """Pin a tensor without labels, such as a weight whose contents are produced by an unsupported operator."""
        self.pins.append(LabelPin(np.zeros(0, np.int64), tensor, axis, size, reason, operator, "hard"))

    def cover(self, coarse: Labels, fine: Labels, kind: Literal["batch", "aligned"]) -> None:
        """Each label of ``coarse``, which varies on fewer axes, covers the labels of ``fine`` at the same positions."""
        a, b = np.broadcast_arrays(coarse, fine)
        own_axes = [k for k, n in enumerate(coarse.shape) if n > 1]
        other_axes = [k for k in range(a.ndim) if k not in own_axes]
        order = own_axes + other_axes
        count = int(np.prod([coarse.shape[k] for k in own_axes], dtype=np.int64))
        keys = a.transpose(order).reshape(count, -1)[:, 0].astype(np.int64)
        rows = np.sort(b.transpose(order).reshape(count, -1).astype(np.int64), axis=1)
        labeled = (keys >= 0) & (rows >= 0).all(1)
        if labeled.any():
            self.covers.append(Cover(keys[labeled], rows[labeled], kind))


def varying_axes(labels: npt.NDArray[Any]) -> frozenset[int]:
    """Axes with more than one entry."""
    return frozenset(k for k, n in enumerate(labels.shape) if n > 1)
