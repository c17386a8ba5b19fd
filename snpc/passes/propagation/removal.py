"""Which positions of a tensor stay, from its label arrays: axis by axis, or ragged where blocks differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.ops.movement import collapse_constant_axes
from snpc.ops.spec import Labels, TensorCut
from snpc.passes.propagation.labels import varying_axes
from snpc.passes.propagation.state import LabeledValue, NormalizationStatistic, Trace
from snpc.types import AnyArray, BoolArray, IntArray, Shape


@dataclass(frozen=True)
class RemovedUnits:
    """What is removed: ``units[u]`` is true where unit u goes; ``unit`` and ``block`` as in ``resolve.Units``."""

    unit_of_label: IntArray
    block_of_unit: IntArray
    removed: BoolArray

    def kept_mask(self, labels: Labels) -> BoolArray:
        """Positions that stay."""
        return np.where(labels >= 0, ~self.removed[self.unit_of_label[labels]], True)

    def affects(self, labels: Labels) -> bool:
        return not bool(self.kept_mask(labels).all())


class NotRectangular(Exception):
    """The positions that stay do not form a box: blocks that share a tensor keep different numbers."""


@dataclass(frozen=True)
class SlicedShape:
    """How one tensor shrinks. ``keep[axis]``: positions that stay; ``along``: the axis on which blocks keep different
    positions, with ``mask`` over the varying axes (after ``keep``) saying which."""

    old_shape: Shape
    new_shape: Shape
    keep: dict[int, IntArray]
    ragged_axis: int | None = None
    mask: BoolArray | None = None

    def slice_labels(self, labels: Labels) -> Labels:
        """The label array of the shrunk tensor."""
        for axis, kept in self.keep.items():
            if labels.shape[axis] > 1:
                labels = labels.take(kept, axis)
        if self.ragged_axis is None or self.mask is None or not varying_axes(labels) & varying_mask_axes(self.mask):
            return collapse_constant_axes(labels)
        shape = np.broadcast_shapes(labels.shape, self.mask.shape)
        full, mask = np.broadcast_to(labels, shape), np.broadcast_to(self.mask, shape)
        moved = np.moveaxis(full, self.ragged_axis, -1)
        kept_mask = np.moveaxis(mask, self.ragged_axis, -1)
        packed = moved[kept_mask].reshape(*moved.shape[:-1], -1)
        return collapse_constant_axes(np.moveaxis(packed, -1, self.ragged_axis))

    def slice_array(self, array: AnyArray) -> AnyArray:
        """The part of a tensor of these axes that stays; axes on which nothing goes may have any size."""
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
        """Old positions that stay along ``axis``; None where blocks differ."""
        if axis == self.ragged_axis:
            return None
        return self.keep.get(axis, np.arange(self.old_shape[axis]))

    def kept_before(self, axis: int, position: int) -> int | None:
        """How many entries stay before ``position``; None where blocks differ in that."""
        if axis == self.ragged_axis and self.mask is not None:
            if axis in self.keep:
                position = int((self.keep[axis] < position).sum())
            inside = np.moveaxis(self.mask, axis, -1)[..., :position].sum(-1)
            return int(inside.flat[0]) if bool((inside == inside.flat[0]).all()) else None
        kept = self.keep.get(axis)
        return position if kept is None else int((kept < position).sum())


def varying_mask_axes(mask: BoolArray) -> frozenset[int]:
    return frozenset(k for k, n in enumerate(mask.shape) if n > 1)


def slice_shape(shape: Shape, factors: Sequence[Labels], dead: RemovedUnits) -> SlicedShape:
    """How a tensor with these factors shrinks. Raises ``NotRectangular`` where it cannot stay a box."""
    cut = [f for f in factors if dead.affects(f)]
    if not cut:
        return SlicedShape(shape, shape, {})
    mask = dead.kept_mask(cut[0])
    for labels in cut[1:]:
        mask = mask & dead.kept_mask(labels)
    keep: dict[int, IntArray] = {}
    for axis in sorted(varying_mask_axes(mask)):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        stays = np.flatnonzero(mask.any(axis=others))
        if len(stays) < mask.shape[axis]:
            keep[axis] = stays
    for axis, stays in keep.items():
        mask = mask.take(stays, axis)
    sizes = list(shape)
    for axis, stays in keep.items():
        sizes[axis] = len(stays)
    if bool(mask.all()):
        return SlicedShape(shape, tuple(sizes), keep)
    along = find_ragged_axis(mask, [take_kept(f, keep) for f in cut], dead)
    sizes[along] = int(np.moveaxis(mask, along, -1).sum(-1).flat[0])
    return SlicedShape(shape, tuple(sizes), keep, along, mask)


def take_kept(labels: Labels, keep: dict[int, IntArray]) -> Labels:
    for axis, stays in keep.items():
        if labels.shape[axis] > 1:
            labels = labels.take(stays, axis)
    return labels


def find_ragged_axis(mask: BoolArray, factors: Sequence[Labels], dead: RemovedUnits) -> int:
    """The axis along which every row keeps the same number; the one within blocks where that is known."""
    candidates = []
    for axis in sorted(varying_mask_axes(mask), reverse=True):
        counts = mask.sum(axis)
        if bool((counts == counts.flat[0]).all()):
            candidates.append(axis)
    for axis in candidates:
        if any(axis in varying_axes(f) and varies_within_block(f, axis, dead) for f in factors):
            return axis
    if candidates:
        return candidates[0]
    raise NotRectangular


def varies_within_block(labels: Labels, axis: int, dead: RemovedUnits) -> bool:
    block = dead.block_of_unit[dead.unit_of_label[np.maximum(labels, 0)]]
    first = block.take([0], axis)
    return bool((block == first).all()) and bool((block >= 0).all())


def to_cut(packed: SlicedShape) -> TensorCut:
    return TensorCut(packed.old_shape, packed.new_shape, packed.kept_before, packed.kept_positions)


def affected_statistics(trace: Trace, dead: RemovedUnits) -> Iterator[NormalizationStatistic]:
    """The statistics that lose something."""
    for statistic in trace.statistics:
        if dead.affects(statistic.labels):
            yield statistic


def removed_along(
    carried: LabeledValue | None, axes: Sequence[int], dead: RemovedUnits
) -> Iterator[tuple[int, BoolArray]]:
    """(axis counted from the right, which positions stay) of the axes along which a value loses something."""
    for labels in carried.factors if carried is not None else ():
        on = {k - labels.ndim for k in varying_axes(labels)}
        if on <= set(axes) and dead.affects(labels):
            (axis,) = on
            yield axis, dead.kept_mask(labels).reshape(-1)
