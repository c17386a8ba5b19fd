"""Operators that work on one position at a time, and the ones that take statistics over axes."""

from __future__ import annotations

import numpy as np

from snpc.ops.spec import Call, Cut, Effect, OpSpec, Repair, Shape

MICROSOFT = "com.microsoft"
SUMMED = "it is summed over"


def _axis(default: int) -> object:
    def axes(call: Call) -> tuple[int, ...]:
        return (int(call.attrs.get("axis", default)) % len(call.shape(0)),)

    return axes


def _softmax_axes(call: Call) -> tuple[int, ...]:
    rank = len(call.shape(0))
    if call.version >= 13:
        return (int(call.attrs.get("axis", -1)) % rank,)
    return tuple(range(int(call.attrs.get("axis", 1)) % rank, rank))


def _from_axis(call: Call) -> tuple[int, ...]:
    rank = len(call.shape(0))
    return tuple(range(int(call.attrs.get("axis", -1)) % rank, rank))


def _last(call: Call) -> tuple[int, ...]:
    return (len(call.shape(0)) - 1,)


def _spatial(call: Call) -> tuple[int, ...]:
    return tuple(range(2, len(call.shape(0))))


def _none(call: Call) -> tuple[int, ...]:
    return ()


def _reduce_axes(call: Call) -> tuple[int, ...]:
    rank = len(call.shape(0))
    given = call.attrs.get("axes")
    if given is None and call.value(1) is not None:
        given = [int(a) for a in call.values[1]]  # type: ignore[union-attr]
    if not given:
        return () if call.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(a) % rank for a in given)


def _resize_repair(call: Call, data: Cut, outs: list[Cut]) -> Repair:
    """``sizes`` (input 3) spells every axis, or those in ``axes``."""
    sizes = call.value(3)
    if sizes is None:
        return Repair()
    axes = call.attrs.get("axes") or range(len(sizes))
    wanted = [
        outs[0].new[axis] if outs[0].new[axis] != outs[0].old[axis] else int(size)
        for axis, size in zip(axes, sizes, strict=True)
    ]
    return Repair(inputs={3: np.asarray(wanted, np.int64)})


def _same_shape(call: Call) -> list[Shape]:
    return [call.shape(0)] * len(call.outs)


def _normed_shapes(call: Call) -> list[Shape]:
    """What is normalised, two statistics per row, and (of the operators that add first) the sum."""
    shape = call.shape(0)
    return [shape, (*shape[:-1], 1), (*shape[:-1], 1), shape][: len(call.outs)]


def _one(names: str, says: str, effect: Effect, domain: str = "") -> list[OpSpec]:
    shapes = _same_shape if domain else None
    return [OpSpec(name, "pointwise", says, domain=domain, effect=effect, out_shapes=shapes) for name in names.split()]


def entries() -> list[OpSpec]:
    nonlinear = (
        "Abs Acos Acosh And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip "
        "Cos Cosh Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less "
        "LessOrEqual Log Max Mean Min Mish Mod Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin "
        "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Where Xor"
    )
    norm = "statistics over the axis: its width stays unless asked; scale and bias follow"
    table = [
        *_one("Add Sum", "positions that meet are joined; constants follow", "add"),
        OpSpec("Sub", "pointwise", "as Add", effect="add", subtracts=True),
        *_one("Mul", "positions that meet are joined; constants follow", "scale"),
        OpSpec("Div", "pointwise", "positions that meet are joined; constants follow", effect="scale", divides=True),
        *_one("Cast CastLike Dropout", "labels pass", "same"),
        *_one("Neg", "labels pass", "scale"),
        *_one(nonlinear, "labels pass; positions that meet are joined", "nonlinear"),
        *_one("FastGelu BiasGelu QuickGelu Gelu", "labels pass; the bias follows", "nonlinear", MICROSOFT),
        OpSpec("Softmax", "normalise", "sums over its axis", axes=_softmax_axes, reason=SUMMED, shares=True),
        OpSpec("LogSoftmax", "normalise", "sums over its axis", axes=_softmax_axes, reason=SUMMED),
        OpSpec("Hardmax", "normalise", "compares along its axis", axes=_softmax_axes, reason="it is compared along"),
        OpSpec("LayerNormalization", "normalise", norm, axes=_from_axis, per_axis=(1, 2), affine=(1, 2), pins="norm"),
        OpSpec("RMSNormalization", "normalise", norm, axes=_from_axis, per_axis=(1,), affine=(1,), pins="norm"),
        OpSpec(
            "SimplifiedLayerNormalization",
            "normalise",
            norm,
            axes=_from_axis,
            per_axis=(1,),
            affine=(1,),
            pins="norm",
            out_shapes=_normed_shapes,
        ),
        OpSpec(
            "LpNormalization",
            "normalise",
            "the axis keeps its width",
            axes=_axis(-1),  # type: ignore[arg-type]
            pins="sum",
            reason="its length is taken over this axis",
        ),
        OpSpec(
            "InstanceNormalization",
            "normalise",
            "per channel; scale and bias follow",
            axes=_spatial,
            per_axis=(-1, -2),
            pins="sum",
            reason="its statistics are taken over this axis",
        ),
        OpSpec(
            "BatchNormalization",
            "normalise",
            "per channel; scale, bias, mean and variance follow",
            axes=_none,
            per_axis=(-1, -2, -3, -4),
        ),
        OpSpec(
            "CumSum",
            "normalise",
            "adds up along its axis",
            axes=lambda call: _cumsum_axes(call),
            reason="it is summed along",
        ),
        OpSpec(
            "SkipLayerNormalization",
            "normalise",
            norm,
            domain=MICROSOFT,
            data=(0, 1),
            axes=_last,
            per_axis=(2, 3, 4),
            affine=(2, 3),
            sums=(3,),
            pins="norm",
            out_shapes=_normed_shapes,
        ),
        OpSpec(
            "SkipSimplifiedLayerNormalization",
            "normalise",
            norm,
            domain=MICROSOFT,
            data=(0, 1),
            axes=_last,
            per_axis=(2, 3),
            affine=(2,),
            sums=(3,),
            pins="norm",
            out_shapes=_normed_shapes,
        ),
    ]
    for name in [
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    ]:
        table.append(
            OpSpec(
                name,
                "reduce",
                "the reduced axes keep their width",
                data=(0,),
                axes=_reduce_axes,
                pins="sum",
                reason="it is reduced over",
            )
        )
    table.append(
        OpSpec(
            "ReduceMean",
            "reduce",
            "the reduced axes keep their width unless asked, where the mean only normalises",
            data=(0,),
            axes=_reduce_axes,
            pins="norm",
            reason="a mean is taken over this axis",
        )
    )
    for name in [
        "GlobalAveragePool",
        "GlobalMaxPool",
        "AveragePool",
        "MaxPool",
        "LpPool",
        "GlobalLpPool",
        "Upsample",
    ]:
        table.append(
            OpSpec(
                name,
                "normalise",
                "per channel over a window",
                axes=_spatial,
                data=(0,),
                reason="it is pooled or resampled",
            )
        )
    table.append(
        OpSpec(
            "Resize",
            "normalise",
            "per channel over a window; the sizes are recomputed",
            axes=_spatial,
            data=(0,),
            repair=_resize_repair,
            reason="it is pooled or resampled",
        )
    )
    for name in ["ArgMax", "ArgMin"]:
        table.append(
            OpSpec(
                name,
                "reduce",
                "the axis keeps its width",
                data=(0,),
                axes=_axis(0),  # type: ignore[arg-type]
                pins="sum",
                reason="positions along it are numbered",
            )
        )
    for name in [
        "Shape",
        "Size",
        "ConstantOfShape",
        "Range",
        "EyeLike",
        "RandomNormalLike",
        "RandomUniformLike",
        "NonZero",
        "OneHot",
    ]:
        table.append(OpSpec(name, "shape", "reads shapes or makes constants: labels end here"))
    return table


def _cumsum_axes(call: Call) -> tuple[int, ...]:
    axis = call.value(1)
    if axis is None:
        return tuple(range(len(call.shape(0))))
    return (int(axis.reshape(-1)[0]) % len(call.shape(0)),)
