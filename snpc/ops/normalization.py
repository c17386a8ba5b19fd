"""Operators that take statistics along axes: normalizations, reductions, pooling; and those that read shapes only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from snpc.ops.spec import MICROSOFT, SUMMED_OVER, OpCall, OpSpec, ParameterUpdate, TensorCut
from snpc.types import Shape

AxesRule = Callable[[OpCall], tuple[int, ...]]
STATISTICS_REASON = "its statistics are taken over this axis"


def _single_axis(default: int) -> AxesRule:
    def axes(call: OpCall) -> tuple[int, ...]:
        return (int(call.attrs.get("axis", default)) % len(call.shape(0)),)

    return axes


def _softmax_axes(call: OpCall) -> tuple[int, ...]:
    rank = len(call.shape(0))
    if call.version >= 13:
        return (int(call.attrs.get("axis", -1)) % rank,)
    return tuple(range(int(call.attrs.get("axis", 1)) % rank, rank))


def _from_axis(call: OpCall) -> tuple[int, ...]:
    rank = len(call.shape(0))
    return tuple(range(int(call.attrs.get("axis", -1)) % rank, rank))


def _last_axis(call: OpCall) -> tuple[int, ...]:
    return (len(call.shape(0)) - 1,)


def _spatial_axes(call: OpCall) -> tuple[int, ...]:
    return tuple(range(2, len(call.shape(0))))


def _last_output_axis(call: OpCall) -> tuple[int, ...]:
    return (len(call.out_shapes[0]) - 1,)


def _channel_axes(call: OpCall) -> tuple[int, ...]:
    return tuple(range(1, len(call.shape(0))))


def _channel_axis_size(call: OpCall) -> int:
    return call.shape(0)[1]


def _no_axes(call: OpCall) -> tuple[int, ...]:
    return ()


def _reduce_axes(call: OpCall) -> tuple[int, ...]:
    rank = len(call.shape(0))
    given = call.attrs.get("axes")
    if given is None and call.value(1) is not None:
        given = [int(a) for a in call.values[1]]  # type: ignore[union-attr]
    if not given:
        return () if call.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(a) % rank for a in given)


def _resampled_axes(call: OpCall) -> tuple[int, ...]:
    """Axes that a Resize or Upsample interpolates along: those that change their size, and all spatial ones that are
    not stored as scaled by 1. A crop, which a region of interest asks for, may be along any axis."""
    shape, out = call.shape(0), call.out_shapes[0]
    if call.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return tuple(range(len(shape)))
    listed = [int(axis) % len(shape) for axis in call.attrs.get("axes") or range(len(shape))]
    stored = call.attrs.get("scales")
    for index in (1, 2) if stored is None else ():  # of an Upsample, or of Resize: with a region of interest or without
        values = call.stored_value(index)
        stored = values if values is not None and len(values) == len(listed) else stored
    scaled = dict(zip(listed, listed if stored is None else stored, strict=False))
    identical = {axis for axis in range(len(shape)) if axis not in listed or (stored is not None and scaled[axis] == 1)}
    return tuple(k for k in range(len(shape)) if shape[k] != out[k] or (k >= 2 and k not in identical))


def _resize_repair(call: OpCall, data: TensorCut, outs: list[TensorCut]) -> ParameterUpdate:
    """``sizes`` (input 3) spells every axis, or those in ``axes``."""
    sizes = call.value(3)
    if sizes is None:
        return ParameterUpdate()
    axes = call.attrs.get("axes") or range(len(sizes))
    new_sizes = [
        outs[0].new[axis] if outs[0].new[axis] != outs[0].old[axis] else int(size)
        for axis, size in zip(axes, sizes, strict=True)
    ]
    return ParameterUpdate(inputs={3: np.asarray(new_sizes, np.int64)})


def _normalization_shapes(call: OpCall) -> list[Shape]:
    return [call.shape(0)] * len(call.out_shapes)


def _skip_normalization_shapes(call: OpCall) -> list[Shape]:
    """What is normalized, two statistics per row, and (of the operators that add first) the sum."""
    shape = call.shape(0)
    return [shape, (*shape[:-1], 1), (*shape[:-1], 1), shape][: len(call.out_shapes)]


def _matrix_axes(call: OpCall) -> tuple[int, ...]:
    rank = len(call.shape(0))
    return (rank - 2, rank - 1)


def _cumulative_axes(call: OpCall) -> tuple[int, ...]:
    axis = call.value(1)
    if axis is None:
        return tuple(range(len(call.shape(0))))
    return (int(axis.reshape(-1)[0]) % len(call.shape(0)),)


def _listed_axes(call: OpCall) -> tuple[int, ...]:
    return tuple(int(a) % len(call.shape(0)) for a in call.attrs.get("axes", (0, 2, 3)))


def channel_groups(call: OpCall) -> int:
    """Into how many groups a GroupNormalization divides its channels."""
    return int(call.attrs["num_groups"])


def _group_attrs(old: OpCall, new: OpCall) -> dict[str, int]:
    """Groups keep their size, since whole ones went; a single one stays."""
    return {"num_groups": max(1, new.shape(0)[1] * channel_groups(old) // old.shape(0)[1])}


def _embedded_shapes(call: OpCall) -> list[Shape]:
    """[batch, length, width], the mask's lengths, and the sum of the embeddings."""
    batch, length = call.shape(0)
    return [(batch, length, call.shape(2)[1]), (batch,), (batch, length, call.shape(2)[1])][: len(call.out_shapes)]


def normalization_entries() -> list[OpSpec]:
    return [*normalization_specs(), *window_specs(), *reduction_specs(), *shape_specs()]


def normalization_specs() -> list[OpSpec]:
    norm = "statistics over the axis: its width stays unless asked; scale and bias follow"
    return [
        OpSpec(
            "Softmax",
            "normalize",
            "sums over its axis",
            axes=_softmax_axes,
            pins="sum",
            reason=SUMMED_OVER,
            makes_shares=True,
        ),
        OpSpec("LogSoftmax", "normalize", "sums over its axis", axes=_softmax_axes, pins="sum", reason=SUMMED_OVER,
            makes_log_shares=True),
        OpSpec("Hardmax", "normalize", "compares along its axis", axes=_softmax_axes, pins="sum",
            reason="it is compared along"),
        OpSpec(
            "LayerNormalization", "normalize", norm, axes=_from_axis, per_axis=(1, 2), affine=(1, 2), pins="norm",
            centered=True,
        ),
        OpSpec("RMSNormalization", "normalize", norm, axes=_from_axis, per_axis=(1,), affine=(1,), pins="norm"),
        OpSpec(
            "SimplifiedLayerNormalization", "normalize", norm, axes=_from_axis, per_axis=(1,), affine=(1,),
            pins="norm", out_shapes=_skip_normalization_shapes,
        ),
        OpSpec(
            "LpNormalization", "normalize", "the axis keeps its width", axes=_single_axis(-1), pins="sum",
            reason="its length is taken over this axis",
        ),
        OpSpec(
            "InstanceNormalization", "normalize",
            "per channel; scale and bias follow; where an exporter folded groups of channels into one, a group goes "
            "as a whole",
            axes=_spatial_axes,
            per_axis=(-1, -2),
            pins="norm",
            reason=STATISTICS_REASON,
            statistic_parts=_channel_axis_size,
            centered=True,
        ),
        OpSpec(
            "GroupNormalization", "normalize", "channels normalized together go together; scale and bias follow",
            axes=_channel_axes, per_axis=(-1, -2), affine=(1, 2), pins="norm", reason=STATISTICS_REASON,
            statistic_parts=channel_groups, centered=True,
            resize_attributes=_group_attrs, out_shapes=_normalization_shapes,
        ),
        OpSpec(
            "MeanVarianceNormalization", "normalize", "the axes it takes statistics over keep their width",
            axes=_listed_axes, pins="sum", reason=STATISTICS_REASON, out_shapes=_normalization_shapes,
        ),
        OpSpec(
            "BatchNormalization", "normalize", "per channel; scale, bias, mean and variance follow", axes=_no_axes,
            per_axis=(-1, -2, -3, -4),
        ),
        OpSpec(
            "EmbedLayerNormalization", "normalize", f"sums rows of its tables; {norm}", domain=MICROSOFT,
            data=(2, 3, 4), tables=(2, 3, 4), axes=_last_output_axis, per_axis=(5, 6), affine=(5, 6), sum_outputs=(2,),
            pins="norm", out_shapes=_embedded_shapes, dtype_input=2, int32_outputs=(1,),
        ),
        OpSpec(
            "SkipLayerNormalization", "normalize", norm, domain=MICROSOFT, data=(0, 1), axes=_last_axis,
            per_axis=(2, 3, 4), affine=(2, 3), sum_outputs=(3,), pins="norm", out_shapes=_skip_normalization_shapes,
        ),
        OpSpec(
            "SkipSimplifiedLayerNormalization", "normalize", norm, domain=MICROSOFT, data=(0, 1), axes=_last_axis,
            per_axis=(2, 3), affine=(2,), sum_outputs=(3,), pins="norm", out_shapes=_skip_normalization_shapes,
        ),
    ]  # fmt: skip


def window_specs() -> list[OpSpec]:
    """Same shape out, or another size of the same axis: what lies along the axes stays, all else passes."""
    pooled = "GlobalAveragePool GlobalMaxPool AveragePool MaxPool LpPool GlobalLpPool"
    resampled = "it is pooled or resampled"
    return [
        *(
            OpSpec(name, "normalize", "per channel over a window", axes=_spatial_axes, data=(0,), reason=resampled)
            for name in pooled.split()
        ),
        OpSpec(
            "Resize", "normalize", "per channel over a window; the sizes are recomputed", axes=_resampled_axes,
            data=(0,), recompute=_resize_repair, reason=resampled,
        ),
        OpSpec(
            "Upsample", "normalize", "per channel over a window", axes=_resampled_axes, data=(0,), reason=resampled,
        ),
        OpSpec("CumSum", "normalize", "adds up along its axis", axes=_cumulative_axes, reason="it is summed along"),
        OpSpec(
            "CumProd", "normalize", "multiplies along its axis", axes=_cumulative_axes, reason="it is multiplied along"
        ),
        OpSpec(
            "Trilu", "normalize", "labels pass on all but the last two axes", axes=_matrix_axes, data=(0,),
            reason="a triangle of it is set to zero",
        ),
    ]  # fmt: skip


def reduction_specs() -> list[OpSpec]:
    others = "L1 L2 LogSum LogSumExp Max Min Prod Sum SumSquare"
    return [
        *(
            OpSpec(
                f"Reduce{name}", "reduce", "the reduced axes keep their width", data=(0,), axes=_reduce_axes,
                pins="sum", reason="it is reduced over", adds_up=name == "Sum",
            )
            for name in others.split()
        ),
        OpSpec(
            "ReduceMean", "reduce", "the reduced axes keep their width unless asked, where the mean only normalizes",
            data=(0,), axes=_reduce_axes, pins="norm", reason="a mean is taken over this axis",
        ),
        *(
            OpSpec(
                name, "reduce", "the axis keeps its width", data=(0,), axes=_single_axis(0), pins="sum",
                reason="positions along it are numbered",
            )
            for name in ("ArgMax", "ArgMin")
        ),
    ]  # fmt: skip


def shape_specs() -> list[OpSpec]:
    """Operators that look at nothing but shapes, or at nothing at all."""
    reading = "Shape Size ConstantOfShape Range EyeLike HannWindow HammingWindow BlackmanWindow"
    return [
        OpSpec("Constant", "shape", "becomes an initializer while loading"),
        *(OpSpec(name, "shape", "reads shapes or makes constants: labels end here") for name in reading.split()),
    ]
