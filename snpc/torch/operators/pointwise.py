"""Operators that compute entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F

from snpc.ops import MICROSOFT
from snpc.torch.operators.registry import TORCH_DTYPES, OperatorCall, Tensor, implements

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": F.relu,
    "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "HardSwish": F.hardswish, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or,
    "PRelu": lambda x, s: torch.where(x < 0, x * s, x),
    "Sub": torch.sub, "Xor": torch.logical_xor,
}  # fmt: skip


def _register_elementwise() -> None:
    for name, one in UNARY.items():
        implements(name)(lambda call, x, one=one: one(x))
    for name, two in BINARY.items():
        implements(name)(lambda call, a, b, two=two: two(a, b))


_register_elementwise()


@implements("Identity")
def run_identity(call: OperatorCall, x: Tensor) -> Tensor:
    return x


@implements("Dropout")
def run_dropout(
    call: OperatorCall, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> tuple[Tensor, ...]:
    """An exported model infers: nothing is dropped."""
    return x, torch.ones_like(x, dtype=torch.bool)


@implements("Cast")
def run_cast(call: OperatorCall, x: Tensor) -> Tensor:
    return x.to(TORCH_DTYPES[call.attrs["to"]])


@implements("CastLike")
def run_cast_like(call: OperatorCall, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@implements("Div")
def run_div(call: OperatorCall, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@implements("Mod")
def run_mod(call: OperatorCall, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


@implements("Pow")
def run_pow(call: OperatorCall, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b.to(a.dtype)).to(a.dtype)


@implements("Max")
def run_max(call: OperatorCall, *values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


@implements("Min")
def run_min(call: OperatorCall, *values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


@implements("Sum")
def run_sum(call: OperatorCall, *values: Tensor) -> Tensor:
    return reduce(torch.add, values)


@implements("Mean")
def run_mean(call: OperatorCall, *values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


@implements("Where")
def run_where(call: OperatorCall, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@implements("IsInf")
def run_is_inf(call: OperatorCall, x: Tensor) -> Tensor:
    positive, negative = torch.isposinf(x), torch.isneginf(x)
    return (positive & bool(call.get("detect_positive", 1))) | (negative & bool(call.get("detect_negative", 1)))


@implements("Clip")
def run_clip(call: OperatorCall, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if call.version < 11:
        return torch.clamp(x, call.get("min"), call.get("max"))
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@implements("Elu")
def run_elu(call: OperatorCall, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


@implements("Celu")
def run_celu(call: OperatorCall, x: Tensor) -> Tensor:
    return F.celu(x, call.get("alpha", 1.0))


@implements("Selu")
def run_selu(call: OperatorCall, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    value: Tensor = gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))
    return value


@implements("LeakyRelu")
def run_leaky_relu(call: OperatorCall, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@implements("ThresholdedRelu")
def run_thresholded_relu(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@implements("HardSigmoid")
def run_hard_sigmoid(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.clamp(x * call.get("alpha", 0.2) + call.get("beta", 0.5), 0, 1)


@implements("Shrink")
def run_shrink(call: OperatorCall, x: Tensor) -> Tensor:
    edge, bias = call.get("lambd", 0.5), call.get("bias", 0.0)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@implements("BitShift")
def run_bit_shift(call: OperatorCall, x: Tensor, by: Tensor) -> Tensor:
    return torch.bitwise_left_shift(x, by) if call.attrs["direction"] == "LEFT" else torch.bitwise_right_shift(x, by)


@implements("Hardmax")
def run_hardmax(call: OperatorCall, x: Tensor) -> Tensor:
    """One at the first of the largest entries; its gradient is zero."""
    axis = call.get("axis", -1 if call.version >= 13 else 1) % x.ndim
    flat = x if call.version >= 13 else x.reshape(math.prod(x.shape[:axis]), -1)
    along = axis if call.version >= 13 else 1
    hot = torch.zeros_like(flat).scatter(along, flat.argmax(along, keepdim=True), 1)
    return hot.reshape(x.shape)


@implements("Swish")
def run_swish(call: OperatorCall, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@implements("Gelu")
def run_gelu(call: OperatorCall, x: Tensor) -> Tensor:
    kind = call.get("approximate", "none")
    return F.gelu(x, approximate=kind.decode() if isinstance(kind, bytes) else kind)


@implements("Gelu", "BiasGelu", domain=MICROSOFT)
def run_bias_gelu(call: OperatorCall, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias)


@implements("FastGelu", domain=MICROSOFT)
def run_fast_gelu(call: OperatorCall, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@implements("QuickGelu", domain=MICROSOFT)
def run_quick_gelu(call: OperatorCall, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


@implements("Softmax", "LogSoftmax")
def run_softmax(call: OperatorCall, x: Tensor) -> Tensor:
    run = F.softmax if call.op == "Softmax" else F.log_softmax
    axis = call.get("axis", -1 if call.version >= 13 else 1)
    if call.version >= 13:
        return run(x, dim=axis)
    axis %= x.ndim
    return run(x.reshape(math.prod(x.shape[:axis]), -1), dim=-1).reshape(x.shape)
