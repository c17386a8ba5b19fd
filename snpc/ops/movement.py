"""Movement: how label arrays move through operators that only move positions, and how their parameters are repaired.

A rule runs on *compressed* label arrays (size 1 on axes without variation), so it costs what the labels vary on, not
what the tensor weighs. Whatever has no such shortcut is broadcast and run by onnx's own reference implementation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import helper

from snpc.ops.single_node import evaluate_node
from snpc.ops.spec import Blocked, Labels, OpCall, OpSpec, ParameterUpdate, TensorCut
from snpc.types import Shape


def collapse_constant_axes(labels: Labels) -> Labels:
    """Drop to size 1 every axis along which the labels are constant."""
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels.take([0], axis)
            if bool((labels == first).all()):
                labels = first
    return labels


def reshape_labels(labels: Labels, source: Shape, target: Shape) -> Labels:
    """Reshape ``source`` to ``target``: only the axes that are merged or split together are touched.

    ``[1,1,768]`` describing ``[8,197,768]`` becomes ``[1,1,12,64]`` without ever holding 8 x 197 x 768 labels. Raises
    Blocked where the labels do not describe ``source``, or the sizes do not factor.
    """
    for axis, size in enumerate(labels.shape):
        if labels.ndim != len(source) or size not in (1, source[axis]):
            raise Blocked(axis, f"{list(labels.shape)} labels do not describe {list(source)}")
    pieces: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        left, right = [], []
        a = b = 1
        if i < len(source):
            a *= source[i]
            left.append(i)
            i += 1
        if j < len(target):
            b *= target[j]
            right.append(j)
            j += 1
        while a != b:
            if a < b and i < len(source):
                a *= source[i]
                left.append(i)
                i += 1
            elif j < len(target):
                b *= target[j]
                right.append(j)
                j += 1
            else:
                raise Blocked(0, f"cannot reshape {list(source)} to {list(target)}")
        pieces.append((left, right))
    shape_out: list[int] = []
    full: list[int] = []
    for left, right in pieces:
        varies = any(labels.shape[k] > 1 for k in left)
        full += [source[k] if varies else 1 for k in left]
        shape_out += [target[k] if varies else 1 for k in right]
    return collapse_constant_axes(np.broadcast_to(labels, full).reshape(shape_out))


def _reshape(call: OpCall, labels: Labels) -> list[Labels]:
    return [reshape_labels(labels, call.shape(0), call.out_shapes[0])]


def _reshape_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    old = call.values[1]
    if old is None:
        return ParameterUpdate(inputs={1: np.asarray(outs[0].new, np.int64)})
    allow_zero = bool(call.attrs.get("allowzero", 0))
    new = np.array(old, np.int64)
    for axis, (before, after) in enumerate(zip(outs[0].old, outs[0].new, strict=True)):
        copies = old[axis] == 0 and not allow_zero
        still_right = old[axis] == -1 or (copies and axis < len(data.new) and data.new[axis] == after)
        if (copies and not still_right) or (before != after and not still_right):
            new[axis] = after
    return ParameterUpdate(inputs={1: new})


def _transpose(call: OpCall, labels: Labels) -> list[Labels]:
    perm = call.attrs.get("perm") or tuple(reversed(range(labels.ndim)))
    if sorted(perm) != list(range(labels.ndim)):
        raise Blocked(0, f"{list(perm)} is no order of its {labels.ndim} axes")
    return [labels.transpose(perm)]


def _expand(call: OpCall, labels: Labels) -> list[Labels]:
    rank = len(call.out_shapes[0])
    return [labels.reshape((1,) * (rank - labels.ndim) + labels.shape)]


def _expand_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    old = call.values[1]
    out = outs[0]
    if old is None:
        return ParameterUpdate(inputs={1: np.asarray(out.new, np.int64)})
    new = np.array(old, np.int64)
    offset = len(out.old) - len(new)
    for axis in range(len(new)):
        if new[axis] != 1 and out.old[axis + offset] != out.new[axis + offset]:
            new[axis] = out.new[axis + offset]
    return ParameterUpdate(inputs={1: new})


def slice_parameters(call: OpCall) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of every axis of a Slice, counted from the front and clipped to the axis."""
    rank = len(call.shape(0))
    if call.version < 10:
        starts, ends = call.attrs["starts"], call.attrs["ends"]
        axes = call.attrs.get("axes") or range(len(starts))
        steps = [1] * len(starts)
    else:
        values = [call.value(k) for k in range(1, 5)]
        if values[0] is None or values[1] is None:
            raise Blocked(0, "its bounds depend on the data")
        starts, ends = values[0].tolist(), values[1].tolist()
        axes = values[2].tolist() if values[2] is not None else list(range(len(starts)))
        steps = values[3].tolist() if values[3] is not None else [1] * len(starts)
    parameters = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = int(axis) % rank
        first, last, stride = slice(int(start), int(end), int(step)).indices(call.shape(0)[axis])
        parameters.append((axis, first, last, stride))
    return parameters


def _slice(call: OpCall, labels: Labels) -> list[Labels]:
    for axis, start, end, step in slice_parameters(call):
        if labels.shape[axis] > 1:
            index = [slice(None)] * labels.ndim
            index[axis] = slice(start, end if end >= 0 else None, step)
            labels = labels[tuple(index)]
    return [collapse_constant_axes(labels)]


def _slice_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    bounds = slice_parameters(call)
    starts, ends, steps = [], [], []
    for axis, start, end, step in bounds:
        first, last, stride = start, end if end >= 0 else -data.new[axis] - 1, step
        if step > 0 and data.old[axis] != data.new[axis]:
            first, last, stride = _kept_slice(data, axis, start, end, step)
        starts.append(first)
        ends.append(last)
        steps.append(stride)
    same_steps = steps == [step for *_, step in bounds]
    if call.version < 10:
        axes = [axis for axis, *_ in bounds]
        return ParameterUpdate(attrs={"starts": starts, "ends": ends, "axes": axes})
    kinds = [call.values[1].dtype, call.values[2].dtype]  # type: ignore[union-attr]
    inputs = {1: np.asarray(starts, kinds[0]), 2: np.asarray(ends, kinds[1])}
    return ParameterUpdate(inputs=inputs if same_steps else inputs | {4: np.asarray(steps, kinds[0])})


def _kept_slice(data: TensorCut, axis: int, start: int, end: int, step: int) -> tuple[int, int, int]:
    """(start, end, step) among the positions that stay of those that a slice picks."""
    kept = data.keep(axis)
    if step == 1 or kept is None:
        first, last = data.before(axis, start), data.before(axis, end)
        if first is None or last is None:
            raise Blocked(axis, "the blocks keep different positions")
        return first, last, step
    places = np.flatnonzero(np.isin(kept, np.arange(start, end, step)))
    gaps = set(np.diff(places).tolist())
    if len(gaps) > 1:
        raise Blocked(axis, "the positions that stay are not evenly spaced")
    if not len(places):
        return 0, 0, step
    return int(places[0]), int(places[-1]) + 1, gaps.pop() if gaps else step


def split_axis(call: OpCall) -> int:
    return int(call.attrs.get("axis", 0)) % len(call.shape(0))


def _split_labels(call: OpCall, labels: Labels) -> list[Labels]:
    axis = split_axis(call)
    if labels.shape[axis] == 1:
        return [labels] * len(call.out_shapes)
    ends = np.cumsum([out[axis] for out in call.out_shapes])
    if ends[-1] != labels.shape[axis]:
        raise Blocked(axis, "its parts do not add up to the axis")
    return [collapse_constant_axes(part) for part in np.split(labels, ends[:-1], axis)]


def _split_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    sizes = [out.new[split_axis(call)] for out in outs]
    if call.version < 13:
        return ParameterUpdate(attrs={"split": sizes})
    return ParameterUpdate(inputs={1: np.asarray(sizes, np.int64)}, attrs={"num_outputs": None})


def gather_axis(call: OpCall) -> int:
    return int(call.attrs.get("axis", 0)) % len(call.shape(0))


def _gather(call: OpCall, labels: Labels) -> list[Labels]:
    axis = int(call.attrs.get("axis", 0)) % labels.ndim
    indices = call.value(1)
    inner = len(call.shape(1))
    if labels.shape[axis] == 1:
        shape = labels.shape[:axis] + (1,) * inner + labels.shape[axis + 1 :]
        return [labels.reshape(shape)]
    if indices is None:
        raise Blocked(axis, "which entries are read depends on the data")
    if indices.size and not -labels.shape[axis] <= indices.min() <= indices.max() < labels.shape[axis]:
        raise Blocked(axis, "an index lies outside of it")
    if call.stored_value(1) is None and has_repeated_labels(labels, axis):
        raise Blocked(axis, "the indices are computed from sizes that are not fixed")
    return [collapse_constant_axes(labels.take(indices, axis))]


def has_repeated_labels(labels: Labels, axis: int) -> bool:
    """Does a label occur twice along ``axis``, as where it was merged with the axis of samples?"""
    rows = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    return len(np.unique(rows, axis=0)) < len(rows)


def _gather_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    axis = int(call.attrs.get("axis", 0)) % len(data.old)
    indices = call.values[1]
    keep = data.keep(axis)
    if indices is None or keep is None:
        raise Blocked(axis, "the kept positions differ between blocks")
    position = np.full(data.old[axis], -1, np.int64)
    position[keep] = np.arange(len(keep))
    moved = position[indices]
    for inner in range(indices.ndim):
        kept = outs[0].keep(axis + inner)
        if kept is not None:
            moved = moved.take(kept, inner)
    if (moved < 0).any():
        raise Blocked(axis, "a removed position is still read")
    return ParameterUpdate(inputs={1: moved.astype(indices.dtype)})


def _identity(call: OpCall, labels: Labels) -> list[Labels]:
    return [labels]


def _pad(call: OpCall, labels: Labels) -> list[Labels]:
    pads = call.attrs.get("pads") if call.version < 11 else call.value(1)
    if pads is None:
        raise Blocked(0, "its padding depends on the data")
    pads = np.asarray(pads)
    axes_given = call.value(3)
    axes = list(range(labels.ndim)) if axes_given is None else [int(a) % labels.ndim for a in axes_given]
    for k, axis in enumerate(axes):
        before, after = int(pads[k]), int(pads[k + len(axes)])
        if (before or after) and labels.shape[axis] > 1:
            if before < 0 or after < 0 or call.attrs.get("mode", "constant") != "constant":
                raise Blocked(axis, "padding along this axis")
            width = [(0, 0)] * labels.ndim
            width[axis] = (before, after)
            labels = np.pad(labels, width, constant_values=-1)
    return [labels]


def _tile(call: OpCall, labels: Labels) -> list[Labels]:
    repeats = call.value(1)
    if repeats is None:
        raise Blocked(0, "its repeats depend on the data")
    return [
        collapse_constant_axes(
            np.tile(labels, [int(r) if n > 1 else 1 for r, n in zip(repeats, labels.shape, strict=True)])
        )
    ]


def _tile_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    return ParameterUpdate(
        inputs={1: np.asarray(outs[0].new, np.int64) // np.maximum(np.asarray(data.new, np.int64), 1)}
    )


def _depth_space_blocks(call: OpCall, labels: Labels) -> list[Labels]:
    """DepthToSpace, SpaceToDepth: positions of the channel and spatial axes mix; run it on the full array."""
    shape = call.shape(0)
    if labels.shape[1] == 1 and all(n == 1 for n in labels.shape[2:]):
        return [labels]
    node = helper.make_node(call.op, ["x"], ["y"], **call.attrs)
    full = np.ascontiguousarray(np.broadcast_to(labels, (1, *shape[1:])))
    (out,) = evaluate_node(node, {"x": full}, call.version)
    return [collapse_constant_axes(np.asarray(out))]


def concat_axis(call: OpCall) -> int:
    return int(call.attrs["axis"]) % len(call.out_shapes[0])


def movement_entries() -> list[OpSpec]:
    def entry(name: str, says: str, move: object, repair: object = None, data: tuple[int, ...] = (0,)) -> OpSpec:
        return OpSpec(name, "movement", says, data=data, move=move, recompute=repair)  # type: ignore[arg-type]

    return [
        entry("Identity", "labels pass", _identity),
        entry("Reshape", "runs on the labels; the target shape is recomputed", _reshape, _reshape_repair),
        entry("Flatten", "runs on the labels", _reshape),
        entry("Squeeze", "runs on the labels", _reshape),
        entry("Unsqueeze", "runs on the labels", _reshape),
        entry("Transpose", "runs on the labels", _transpose),
        replace(
            entry("Expand", "labels repeat; the target shape is recomputed", _expand, _expand_repair), expands=True
        ),
        entry("Tile", "labels repeat; the repeats are recomputed", _tile, _tile_repair),
        entry("Slice", "runs on the labels; the bounds are recomputed", _slice, _slice_repair),
        entry("Split", "runs on the labels; the sizes are recomputed", _split_labels, _split_repair),
        replace(
            entry("Gather", "runs on the labels; constant indices are renumbered", _gather, _gather_repair),
            selects=True,
            index_axis=gather_axis,
        ),
        entry("Pad", "runs on the labels; what is padded has none", _pad),
        entry("DepthToSpace", "runs on the labels", _depth_space_blocks),
        entry("SpaceToDepth", "runs on the labels", _depth_space_blocks),
        OpSpec("Concat", "concat", "labels are concatenated along the axis and unified on the others"),
    ]
