"""Removed units and the sliced shape of a tensor: positions that stay, axis by axis or block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.ops import Labels, TensorCut, collapse_constant_axes
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import LabeledValue, NormalizationStatistic, Trace
from snpc.types import AnyArray, BoolArray, IntArray, Shape


@dataclass(frozen=True)
class RemovedUnits:
    """Units that are removed, as a whole or with the head that they lie in: ``removed[label]`` is true for their labels
    there. ``block_of_label``: the block of each label's unit, -1 for none."""

    removed: BoolArray
    block_of_label: IntArray

    def kept_mask(self, labels: Labels) -> BoolArray:
        """True at positions that stay; shape of ``labels``."""
        return (labels < 0) | ~self.removed[labels]

    def affects(self, labels: Labels) -> bool:
        """Whether any of the positions is removed."""
        return not bool(self.kept_mask(labels).all())


class NotRectangular(Exception):
    """The positions that stay form no rectangular tensor: blocks that share a tensor keep different numbers of
    units."""


@dataclass(frozen=True)
class SlicedShape:
    """How one tensor is sliced.

    ``keep[axis]``: positions that stay along an axis that is sliced the same way everywhere. ``ragged_axis``: the axis
    along which blocks keep different positions; ``mask`` says which, over the varying axes after ``keep`` is applied.
    """

    old_shape: Shape
    new_shape: Shape
    keep: dict[int, IntArray]
    ragged_axis: int | None = None
    mask: BoolArray | None = None

    def slice_labels(self, labels: Labels) -> Labels:
        """The label array of the sliced tensor."""
        for axis, kept in self.keep.items():
            if labels.shape[axis] > 1:
                labels = labels.take(kept, axis)
        if self.ragged_axis is None or self.mask is None or not varying_axes(labels) & varying_axes(self.mask):
            return collapse_constant_axes(labels)
        shape = np.broadcast_shapes(labels.shape, self.mask.shape)
        full, mask = np.broadcast_to(labels, shape), np.broadcast_to(self.mask, shape)
        moved = np.moveaxis(full, self.ragged_axis, -1)
        kept_mask = np.moveaxis(mask, self.ragged_axis, -1)
        sliced = moved[kept_mask].reshape(*moved.shape[:-1], -1)
        return collapse_constant_axes(np.moveaxis(sliced, -1, self.ragged_axis))

    def slice_array(self, array: AnyArray) -> AnyArray:
        """The part of ``array`` that stays. Axes along which nothing is removed may have any size."""
        for axis, kept in self.keep.items():
            array = array.take(kept, axis)
        if self.ragged_axis is None or self.mask is None:
            return array
        moved = np.moveaxis(array, self.ragged_axis, -1)
        mask = np.moveaxis(np.broadcast_to(self.mask, array.shape), self.ragged_axis, -1)
        return np.moveaxis(
            moved[mask].reshape(*moved.shape[:-1], self.new_shape[self.ragged_axis]), -1, self.ragged_axis
        )

    def kept_positions(self, axis: int) -> IntArray | None:
        """Old positions that stay along ``axis``; None where blocks keep different ones."""
        if axis == self.ragged_axis:
            return None
        return self.keep.get(axis, np.arange(self.old_shape[axis]))

    def kept_before(self, axis: int, position: int) -> int | None:
        """How many entries stay before ``position`` along ``axis``; None where this differs between blocks."""
        if axis == self.ragged_axis and self.mask is not None:
            if axis in self.keep:
                position = int((self.keep[axis] < position).sum())
            inside = np.moveaxis(self.mask, axis, -1)[..., :position].sum(-1)
            return int(inside.flat[0]) if bool((inside == inside.flat[0]).all()) else None
        kept = self.keep.get(axis)
        return position if kept is None else int((kept < position).sum())


def slice_shape(shape: Shape, factors: Sequence[Labels], removed: RemovedUnits) -> SlicedShape:
    """How a tensor with these factors is sliced. Raises NotRectangular where the result is no rectangular tensor."""
    affected = [f for f in factors if removed.affects(f)]
    if not affected:
        return SlicedShape(shape, shape, {})
    mask = removed.kept_mask(affected[0])
    for labels in affected[1:]:
        mask = mask & removed.kept_mask(labels)
    keep: dict[int, IntArray] = {}
    for axis in sorted(varying_axes(mask)):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        kept = np.flatnonzero(mask.any(axis=others))
        if len(kept) < mask.shape[axis]:
            keep[axis] = kept
    for axis, kept in keep.items():
        mask = mask.take(kept, axis)
    new_shape = list(shape)
    for axis, kept in keep.items():
        new_shape[axis] = len(kept)
    if bool(mask.all()):
        return SlicedShape(shape, tuple(new_shape), keep)
    ragged_axis = find_ragged_axis(mask, [take_kept(f, keep) for f in affected], removed)
    new_shape[ragged_axis] = int(np.moveaxis(mask, ragged_axis, -1).sum(-1).flat[0])
    return SlicedShape(shape, tuple(new_shape), keep, ragged_axis, mask)


def take_kept(labels: Labels, keep: dict[int, IntArray]) -> Labels:
    """``labels`` at the positions that stay."""
    for axis, kept in keep.items():
        if labels.shape[axis] > 1:
            labels = labels.take(kept, axis)
    return labels


def find_ragged_axis(mask: BoolArray, factors: Sequence[Labels], removed: RemovedUnits) -> int:
    """The axis along which every row keeps the same number of positions, preferably one that varies within blocks.

    Raises NotRectangular if there is none.
    """
    candidates = []
    for axis in sorted(varying_axes(mask), reverse=True):
        counts = mask.sum(axis)
        if bool((counts == counts.flat[0]).all()):
            candidates.append(axis)
    for axis in candidates:
        if any(axis in varying_axes(f) and varies_within_block(f, axis, removed) for f in factors):
            return axis
    if candidates:
        return candidates[0]
    raise NotRectangular


def varies_within_block(labels: Labels, axis: int, removed: RemovedUnits) -> bool:
    """Whether all positions along ``axis`` belong to one block."""
    block = removed.block_of_label[np.maximum(labels, 0)]
    first = block.take([0], axis)
    return bool((block == first).all()) and bool((block >= 0).all())


def to_cut(sliced: SlicedShape) -> TensorCut:
    """The sliced shape as operators' parameter updates read it."""
    return TensorCut(sliced.old_shape, sliced.new_shape, sliced.kept_before, sliced.kept_positions)


def affected_statistics(trace: Trace, removed: RemovedUnits) -> Iterator[NormalizationStatistic]:
    """Normalization statistics over positions of which some are removed."""
    for statistic in trace.statistics:
        if removed.affects(statistic.labels):
            yield statistic


def removed_along(
    labeled_value: LabeledValue | None, axes: Sequence[int], removed: RemovedUnits
) -> Iterator[tuple[int, BoolArray]]:
    """(axis counted from the right, mask of the positions that stay) for each of ``axes`` along which a value is
    sliced, at the same positions everywhere (in every head of which something stays)."""
    stays: dict[int, BoolArray] = {}
    for labels in labeled_value.factors if labeled_value is not None else ():
        inner = {k - labels.ndim for k in varying_axes(labels)} & set(axes)
        if len(inner) != 1 or not removed.affects(labels):
            continue
        (axis,) = inner
        rows = np.moveaxis(removed.kept_mask(labels), axis, -1).reshape(-1, labels.shape[axis])
        rows = rows[rows.any(1)]
        if len(rows) and not rows[0].all() and (rows == rows[0]).all():
            stays[axis] = stays[axis] & rows[0] if axis in stays else rows[0]
    yield from stays.items()
