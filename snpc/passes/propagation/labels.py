"""The book that the trace writes: labels, and what is learnt about them.

A label is an integer for one position of one axis of one constant. ``pairs`` says which labels are one unit;
``slabs`` says that a coarser label (of a head, say) covers a set of finer ones; ``flags`` remember what happened to a
label on its way; pins say why a label stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.ops.spec import Labels
from snpc.types import IntArray, PinKind


class LabelFlag(IntFlag):
    PRODUCED = 1  # output axis of a constant weight
    CONSUMED = 2  # contracted with a constant weight
    SCORED = 4  # contracted with another activation
    PASSED_THROUGH = 8  # passed through a product of activations without being contracted: a value
    ADDED = 16  # added to another activation
    GATED = 32  # multiplied with another activation
    CONVOLVED = 64  # made by a convolution
    NONLINEAR = 128  # went through a nonlinear operator
    SCALED = 256  # multiplied by a constant that differs between positions
    WEIGHT_INPUT = 512  # input axis of a constant weight
    NORM_PARAMETER = 1024  # scale or bias of a normalisation
    BATCHED = 4096  # a product of activations is done once per position of it
    CACHED = 2048  # lies in a cache of keys or values


@dataclass(frozen=True)
class LabeledAxis:
    """Labels ``first .. first + size`` belong to this axis of this constant."""

    constant: ir.Value
    axis: int
    first_label: int
    size: int


@dataclass(frozen=True, eq=False)
class Cover:
    """``keys[i]`` covers the labels ``members[i]``. ``batch``: seen where a product of activations is done per key."""

    coarse: IntArray
    fine: IntArray
    kind: Literal["batch", "meet"]


@dataclass(frozen=True, eq=False)
class LabelPin:
    labels: IntArray
    tensor: str
    axis: int
    size: int
    reason: str
    operator: str
    kind: PinKind


@dataclass
class LabelTable:
    count: int = 0
    axes: list[LabeledAxis] = field(default_factory=list)
    pairs: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    covers: list[Cover] = field(default_factory=list)
    pins: list[LabelPin] = field(default_factory=list)
    flags: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(1024, np.int32))

    def allocate(self, size: int) -> Labels:
        first = self.count
        self.count += size
        if self.count > len(self.flags):
            self.flags = np.concatenate([self.flags, np.zeros(max(self.count, len(self.flags)), np.int32)])
        return np.arange(first, first + size, dtype=np.int32)

    def label_axis(self, constant: ir.Value, axis: int, size: int) -> Labels:
        labels = self.allocate(size)
        self.axes.append(LabeledAxis(constant, axis, int(labels[0]), size))
        return labels

    def unify(self, left: Labels, right: Labels) -> None:
        """Positions that meet are one unit; where only one side has a label the caller must have pinned it."""
        a, b = np.broadcast_arrays(left, right)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            pairs = np.unique(np.stack([a[both], b[both]], 1), axis=0).astype(np.int64)
            self.pairs.append((pairs[:, 0], pairs[:, 1]))

    def cover_in_common(self, left: Labels, right: Labels, kind: Literal["batch", "meet"]) -> None:
        """Two factors with some axes in common, each with axes of its own: one fresh label per common position
        covers both (rows and columns of one score matrix per head)."""
        common = varying_axes(left) & varying_axes(right)
        shape = [n if k in common else 1 for k, n in enumerate(left.shape)]
        coarse = self.allocate(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        self.cover(coarse, left, kind)
        self.cover(coarse, right, kind)

    def unify_or_cover(self, left: Labels, right: Labels) -> None:
        """Two factors on the same axes: joined position by position, or, where one is coarser (heads over heads x
        width in one flat axis), its labels cover those of the other."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(left, right))
        if (a < 0).any() or (b < 0).any():
            return self.unify(left, right)
        kinds = len(np.unique(a)), len(np.unique(b))
        together = len(np.unique(a.astype(np.int64) * self.count + b))
        coarse, fine = (a, b) if kinds[0] < kinds[1] else (b, a)
        if kinds[0] == kinds[1] or together != max(kinds):
            return self.unify(left, right)
        order = np.argsort(coarse, kind="stable")
        counts = np.unique(coarse[order], return_counts=True)[1]
        if (counts != counts[0]).any():
            return self.unify(left, right)
        members = np.sort(fine[order].reshape(-1, counts[0]).astype(np.int64), axis=1)
        self.covers.append(Cover(np.unique(coarse).astype(np.int64), members, "meet"))
        return None

    def flag(self, labels: Labels, flag: LabelFlag) -> None:
        named = labels[labels >= 0]
        self.flags[named] |= int(flag)

    def pin(
        self, labels: Labels, tensor: str, axis: int, size: int, reason: str, operator: str, kind: PinKind = "hard"
    ) -> None:
        named = np.unique(labels[labels >= 0]).astype(np.int64)
        if len(named):
            self.pins.append(LabelPin(named, tensor, axis, size, reason, operator, kind))

    def pin_unlabeled(self, tensor: str, axis: int, size: int, reason: str, operator: str) -> None:
        """A pin of something that has no labels at all: a weight that snpc cannot see into."""
        self.pins.append(LabelPin(np.zeros(0, np.int64), tensor, axis, size, reason, operator, "hard"))

    def cover(self, coarse: Labels, fine: Labels, kind: Literal["batch", "meet"]) -> None:
        """``coarse`` varies on fewer axes than ``fine``: each of its labels covers the fine ones beneath it."""
        a, b = np.broadcast_arrays(coarse, fine)
        varying = [k for k, n in enumerate(coarse.shape) if n > 1]
        rest = [k for k in range(a.ndim) if k not in varying]
        order = varying + rest
        count = int(np.prod([coarse.shape[k] for k in varying], dtype=np.int64))
        keys = a.transpose(order).reshape(count, -1)[:, 0].astype(np.int64)
        members = np.sort(b.transpose(order).reshape(count, -1).astype(np.int64), axis=1)
        known = (keys >= 0) & (members >= 0).all(1)
        if known.any():
            self.covers.append(Cover(keys[known], members[known], kind))


def varying_axes(labels: Labels) -> frozenset[int]:
    return frozenset(k for k, n in enumerate(labels.shape) if n > 1)
