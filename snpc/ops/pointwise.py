"""Operators that work on one position at a time."""

from __future__ import annotations

from snpc.ops.spec import MICROSOFT, Effect, OpCall, OpSpec
from snpc.types import Shape

NONLINEAR = (
    "Abs Acos Acosh And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip "
    "Cos Cosh Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less "
    "LessOrEqual Log Max Mean Min Mish Mod Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin "
    "Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Xor"
)


def _pointwise_shapes(call: OpCall) -> list[Shape]:
    return [call.shape(0)] * len(call.out_shapes)


def _pointwise_specs(names: str, says: str, effect: Effect, domain: str = "") -> list[OpSpec]:
    shapes = _pointwise_shapes if domain else None
    return [OpSpec(name, "pointwise", says, domain=domain, effect=effect, out_shapes=shapes) for name in names.split()]


def pointwise_entries() -> list[OpSpec]:
    return [
        *_pointwise_specs("Add Sum", "aligned positions are unified; constants follow", "add"),
        OpSpec("Sub", "pointwise", "as Add", effect="add", subtracts=True),
        *_pointwise_specs("Mul", "aligned positions are unified; constants follow", "scale"),
        OpSpec("Div", "pointwise", "aligned positions are unified; constants follow", effect="scale", divides=True),
        *_pointwise_specs("Cast CastLike Dropout", "labels pass", "same"),
        *_pointwise_specs("Neg", "labels pass", "scale"),
        OpSpec("Where", "pointwise", "labels pass; aligned positions are unified", chooses=True),
        *_pointwise_specs(NONLINEAR, "labels pass; aligned positions are unified", "nonlinear"),
        OpSpec("Swish", "pointwise", "labels pass; aligned positions are unified", out_shapes=_pointwise_shapes),
        *_pointwise_specs("FastGelu BiasGelu QuickGelu Gelu", "labels pass; the bias follows", "nonlinear", MICROSOFT),
    ]
