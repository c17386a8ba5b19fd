"""Reading and writing positions that an index tensor names."""

from __future__ import annotations

import numpy as np

from snpc.ops.movement import collapse_constant_axes, gather_axis
from snpc.ops.spec import Blocked, Labels, OpCall, OpSpec, ParameterUpdate, TensorCut
from snpc.types import AnyArray, IntArray

POSITIONS = "which positions are read depends on the data"
DATA_DEPENDENT = "which entries are read depends on the data"


def indexed_axes(call: OpCall, indices: int) -> range:
    """Axes of the data that the last axis of ``indices`` addresses, behind the batch axes."""
    batch = int(call.attrs.get("batch_dims", 0))
    return range(batch, batch + call.shape(indices)[-1])


def _only_indexed_axis(call: OpCall) -> int | None:
    axes = indexed_axes(call, 1)
    return axes.start if len(axes) == 1 and not axes.start else None


def check_indices(indices: AnyArray, sizes: IntArray, axis: int) -> None:
    if bool(((indices < -sizes) | (indices >= sizes)).any()):
        raise Blocked(axis, "an index lies outside of it")


def _gather_nd(call: OpCall, labels: Labels) -> list[Labels]:
    axes = indexed_axes(call, 1)
    inner = len(call.shape(1)) - 1
    batch = axes.start
    trailing = labels.shape[axes.stop :]
    if all(labels.shape[k] == 1 for k in axes):
        return [labels.reshape(labels.shape[:batch] + (1,) * (inner - batch) + trailing)]
    indices = call.stored_value(1)
    varied = next(k for k in axes if labels.shape[k] > 1)
    if indices is None or batch:
        raise Blocked(varied, DATA_DEPENDENT)
    check_indices(indices, np.asarray(call.shape(0)[: axes.stop]), varied)
    full = np.broadcast_to(labels, (*call.shape(0)[: axes.stop], *trailing))
    return [collapse_constant_axes(full[tuple(np.moveaxis(indices, -1, 0))])]


def _gather_nd_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    indices = call.stored_value(1)
    if indices is None:
        raise Blocked(0, DATA_DEPENDENT)
    new = np.array(indices)
    for place, axis in enumerate(indexed_axes(call, 1)):
        new[..., place] = renumber_indices(indices[..., place], axis, data)
    for axis in range(indices.ndim - 1):
        kept = outs[0].keep(axis)
        new = new if kept is None else new.take(kept, axis)
    if (new < 0).any():
        raise Blocked(0, "a removed position is still read")
    return ParameterUpdate(inputs={1: new.astype(indices.dtype)})


def renumber_indices(indices: IntArray, axis: int, data: TensorCut) -> IntArray:
    keep = data.keep(axis)
    if keep is None:
        raise Blocked(axis, "the kept positions differ between blocks")
    position = np.full(data.old[axis], -1, np.int64)
    position[keep] = np.arange(len(keep))
    return position[indices]


def _gather_elements(call: OpCall, labels: Labels) -> list[Labels]:
    """The index tensor has the output's shape. Where labels vary it must be known, or repeat."""
    axis = int(call.attrs.get("axis", 0)) % labels.ndim
    indices = call.stored_value(1)
    varied = [k for k in range(labels.ndim) if labels.shape[k] > 1]
    if not varied:
        return [labels]
    if indices is None:
        raise Blocked(varied[0], DATA_DEPENDENT if axis in varied else "the tensor of indices has this axis as well")
    check_indices(indices, np.asarray(call.shape(0)[axis]), axis)
    if axis not in varied:
        return [labels[tuple(slice(n) for n in indices.shape)]]
    full = np.broadcast_to(labels, call.shape(0))
    cropped = full[tuple(slice(None) if k == axis else slice(n) for k, n in enumerate(indices.shape))]
    return [collapse_constant_axes(np.take_along_axis(cropped, indices, axis))]


def _gather_elements_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    indices = call.stored_value(1)
    axis = int(call.attrs.get("axis", 0)) % len(data.old)
    if indices is None:
        raise Blocked(axis, DATA_DEPENDENT)
    new = np.array(indices)
    if data.old[axis] != data.new[axis]:
        new = renumber_indices(indices, axis, data)
    for k in range(indices.ndim):
        kept = outs[0].keep(k)
        new = new if kept is None else new.take(kept, k)
    if (new < 0).any():
        raise Blocked(axis, "a removed position is still read")
    return ParameterUpdate(inputs={1: new.astype(indices.dtype)})


def _written_axes(call: OpCall) -> tuple[int, ...]:
    return tuple(indexed_axes(call, 1))


def _element_axes(call: OpCall) -> tuple[int, ...]:
    """The index tensor has the shape of the updates: no axis of theirs can change."""
    return tuple(range(len(call.shape(0))))


def _positions(call: OpCall) -> tuple[int, ...]:
    """Behind samples and channels."""
    return tuple(range(2, len(call.shape(0))))


def _all_but_channels(call: OpCall) -> tuple[int, ...]:
    return tuple(k for k in range(len(call.shape(0))) if k != 1)


def indexing_entries() -> list[OpSpec]:
    reads = "runs on the labels; constant indices are renumbered, an axis that others address stays"
    writes = "labels pass on the axes behind those that the indices address; these stay"
    return [
        OpSpec(
            "GatherND", "movement", reads, data=(0,), move=_gather_nd, recompute=_gather_nd_repair,
            index_axis=_only_indexed_axis,
        ),
        OpSpec(
            "GatherElements", "movement", reads, data=(0,), move=_gather_elements, recompute=_gather_elements_repair,
            index_axis=gather_axis,
        ),
        OpSpec(
            "GridSample", "sample", "labels pass on channels and samples; positions stay, and so does the grid",
            data=(0,), axes=_positions, reason=POSITIONS,
        ),
        OpSpec(
            "RoiAlign", "sample", "labels pass on channels; positions and regions stay", data=(0,),
            axes=_all_but_channels, reason=POSITIONS,
        ),
        OpSpec("ScatterND", "scatter", writes, data=(0, 2), axes=_written_axes, reason="positions of it are written"),
        *(
            OpSpec(
                name, "scatter", "what it addresses stays: its indices have the shape of what they write",
                data=(0, 2), axes=_element_axes, reason="positions of it are written", index_axis=gather_axis,
            )
            for name in ("ScatterElements", "Scatter")
        ),
    ]  # fmt: skip
