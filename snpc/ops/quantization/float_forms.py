"""Which float operator a node on quantized values stands for, and what its operands are.

Inputs are those of the ONNX standard and of onnxruntime's page of contrib operators (github.com/microsoft/onnxruntime,
folder docs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snpc.ops import names
from snpc.ops.quantization.arrays import UNPACKED_BITS, dequantize_blocks, dequantize_levels, dequantize_table
from snpc.ops.quantization.costs import unpacked_table_shape
from snpc.ops.quantization.layouts import Layout, read_stored
from snpc.ops.spec import MICROSOFT
from snpc.types import AnyArray, Shape

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Plain:
    """An operand that is the float input ``data`` itself."""

    data: int


@dataclass(frozen=True)
class Quantized:
    """An operand that input ``data`` is the quantized form of. ``axis``: the one that a vector of scales belongs to;
    ``block``: the attribute with the length of blocks that share a scale. ``scale`` None: whoever reads the output
    multiplies by it."""

    data: int
    scale: int | None
    zero_point: int
    axis: int | str | Callable[[Attributes], int] = -1
    block: str = ""

    def axis_of(self, attributes: Attributes) -> int:
        if callable(self.axis):
            return self.axis(attributes)
        return int(attributes.get(self.axis, 1)) if isinstance(self.axis, str) else self.axis


@dataclass(frozen=True)
class QuantizedBias:
    """A vector of int32 whose scale is the product of two ``scales``, and of attribute ``alpha`` where there is one."""

    data: int
    scales: tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """A constant that ``unpack`` makes of the stored inputs, weight and scales first (None: left out).

    ``shape``: of that constant, from the attributes, the stored shape of the weight, and the bits of its entries.
    ``layout``: how the inputs lie. ``bits``: attributes with the bits of a code, the first that is given.
    """

    inputs: tuple[int, ...]
    unpack: Callable[[Attributes, tuple[AnyArray | None, ...]], AnyArray]
    shape: Callable[[Attributes, Shape, int], Shape]
    layout: Layout
    bits: tuple[str, ...] = ("bits",)

    def attributes_of(self, attributes: Attributes) -> dict[str, Any]:
        """Those of the node, with the bits of this constant as "bits"."""
        return {**attributes, "bits": next((int(attributes[name]) for name in self.bits if name in attributes), 4)}


Operand = Plain | Quantized | QuantizedBias | Packed


@dataclass(frozen=True)
class FloatForm:
    """The float node that a node on quantized values stands for.

    ``op`` None: the first operand itself. ``keep``: attributes that stay, by their names there. ``bias`` is added, or
    is an operand of its own where ``adds_bias`` is False; ``output``: (scale, zero point) of the first output, which is
    float where they are not given. ``sums``: the output is the integer sum, which its reader casts and scales.
    ``condition``: whether attributes, and the types of the inputs ("" of those left out), have this meaning.
    """

    op: str | None
    operands: tuple[Operand, ...]
    keep: Mapping[str, str] | None = None
    bias: Operand | None = None
    output: tuple[int, int] | None = None
    domain: str = ""
    sums: bool = False
    adds_bias: bool = True
    condition: Callable[[Attributes, Sequence[str]], bool] | None = None
    repeated: bool = False
    """The last operand stands for one after each three inputs, as many as there are."""
    written_back: bool = True
    """Whether the float node, cut, can be this node again."""
    equal_widths: int | None = None
    """The input whose columns are queries, keys and values, which have one width in this node."""

    def operands_of(self, inputs: int) -> tuple[Operand, ...]:
        """The operands of a node with so many inputs."""
        last = self.operands[-1]
        if not self.repeated or not isinstance(last, Quantized):
            return self.operands
        return tuple(Quantized(k, k + 1, k + 2) for k in range(last.data, inputs, 3))

    def attributes(self, attributes: Attributes) -> dict[str, Any]:
        keep = {name: name for name in attributes} if self.keep is None else self.keep
        return {new: attributes[old] for old, new in keep.items() if old in attributes}


def _pointwise(op: str, keep: tuple[str, ...] = ()) -> FloatForm:
    return FloatForm(op, (Quantized(0, 1, 2),), {name: name for name in keep}, output=(3, 4))


def _two_operands(op: str) -> FloatForm:
    return FloatForm(op, (Quantized(0, 1, 2), Quantized(3, 4, 5)), {}, output=(6, 7))


def _convolution() -> FloatForm:
    operands = (Quantized(0, 1, 2), Quantized(3, 4, 5, axis=0))
    bias = QuantizedBias(8, (1, 4))
    return FloatForm("Conv", operands, bias=bias, output=(6, 7), adds_bias=False, condition=_channels_first)


def _channels_first(attributes: Attributes, types: Sequence[str]) -> bool:
    return not attributes.get("channels_last", 0)


def _column_axis(attributes: Attributes) -> int:
    return 0 if attributes.get("transB", 0) else 1


def _softmax_of_one_axis(attributes: Attributes, types: Sequence[str]) -> bool:
    return int(attributes.get("opset", 0)) >= 13


def _is_transposed(attributes: Attributes, types: Sequence[str]) -> bool:
    return bool(attributes.get("transB", 1))


def _fills_bytes(attributes: Attributes, types: Sequence[str]) -> bool:
    return attributes.get("bits", 4) in UNPACKED_BITS and not attributes.get("weight_prepacked", 0)


def _product_shape(attributes: Attributes, stored: Shape, bits: int) -> Shape:
    return int(attributes["K"]), int(attributes["N"])


def _experts_in_order(attributes: Attributes, types: Sequence[str]) -> bool:
    """Whether codes lie as they are multiplied: not where they may be laid out for one device, as files for CUDA in
    half precision are that do not say so, and not where the gates are not what the router compares."""
    layout, half = int(attributes.get("weights_prepacked", -1)), types[_EXPERT_SCALES] in ("FLOAT16", "BFLOAT16")
    in_order = layout == 0 or (layout < 0 and not (half and not attributes.get("block_size", 0)))
    bits = {attributes.get(name, 4) for name in _EXPERT_BITS if name == _EXPERT_BITS[0] or name in attributes}
    integers = attributes.get("quant_type", "int") == "int" and bits.issubset(UNPACKED_BITS)
    return in_order and integers and not any(types[_AFTER_ZERO_POINTS:])


def _experts_weight(attributes: Attributes, stored: tuple[AnyArray | None, ...]) -> AnyArray:
    parts = {name: array for name, array in zip(("codes", "scale", "zero"), stored, strict=True) if array is not None}
    return read_stored("experts", parts, attributes, -1, 0).dequantize()


def _experts_layer(layer: int, inputs: tuple[int, int, int]) -> Packed:
    bits = (_EXPERT_BITS[layer], _EXPERT_BITS[0])
    return Packed(inputs, _experts_weight, unpacked_table_shape, "experts", bits)


_EXPERT_BITS = ("expert_weight_bits", *(f"fc{layer}_expert_weight_bits" for layer in (1, 2, 3)))
_EXPERT_SCALES = 3
_AFTER_ZERO_POINTS = 14  # inputs of QMoE from here on: gates of their own, scales of floats
_EXPERTS = (
    *(Plain(0), Plain(1)),
    *(_experts_layer(1, (2, 3, 11)), Plain(4)),
    *(_experts_layer(2, (5, 6, 12)), Plain(7)),
    *(_experts_layer(3, (8, 9, 13)), Plain(10)),
)
_EXPERT_ATTRIBUTES = (
    *("k", "activation_type", "activation_alpha", "activation_beta", "normalize_routing_weights"),
    *("use_sparse_mixer", "swiglu_fusion", "swiglu_limit", "swiglu_limit_after_activation"),
)
_BLOCKED = Quantized(0, 1, 2, axis="axis", block="block_size")
_ATTENTION_ATTRIBUTES = (
    *("num_heads", "unidirectional", "scale", "mask_filter_value"),
    *("do_rotary", "past_present_share_buffer"),
)
_ATTENTION = (Quantized(0, 3, 6), Quantized(1, 4, 7), Plain(2), Plain(5), Plain(8))

FLOAT_FORMS: Mapping[tuple[str, str], FloatForm] = {
    ("", "DequantizeLinear"): FloatForm(None, (_BLOCKED,)),
    ("", "QuantizeLinear"): FloatForm(None, (Plain(0),), output=(1, 2)),
    (MICROSOFT, "DequantizeLinear"): FloatForm(None, (_BLOCKED,)),
    (MICROSOFT, "QuantizeLinear"): FloatForm(None, (Plain(0),), output=(1, 2)),
    ("", "MatMulInteger"): FloatForm(names.MATMUL, (Quantized(0, None, 2), Quantized(1, None, 3)), sums=True),
    ("", "ConvInteger"): FloatForm("Conv", (Quantized(0, None, 2), Quantized(1, None, 3, axis=0)), sums=True),
    ("", "QLinearMatMul"): _two_operands(names.MATMUL),
    ("", "QLinearConv"): _convolution(),
    (MICROSOFT, "QLinearConv"): _convolution(),
    (MICROSOFT, "QGemm"): FloatForm(
        names.GEMM,
        (Quantized(0, 1, 2), Quantized(3, 4, 5, axis=_column_axis)),
        bias=QuantizedBias(6, (1, 4)),
        output=(7, 8),
        adds_bias=False,
    ),
    (MICROSOFT, "MatMulIntegerToFloat"): FloatForm(
        names.MATMUL, (Quantized(0, 2, 4), Quantized(1, 3, 5)), {}, bias=Plain(6)
    ),
    (MICROSOFT, "DynamicQuantizeMatMul"): FloatForm(names.MATMUL, (Plain(0), Quantized(1, 2, 3)), {}, bias=Plain(4)),
    (MICROSOFT, "MatMulNBits"): FloatForm(
        names.MATMUL,
        (Plain(0), Packed((1, 2, 3, 4), dequantize_blocks, _product_shape, "product")),
        {},
        bias=Plain(5),
        condition=_fills_bytes,
    ),
    (MICROSOFT, "MatMulBnb4"): FloatForm(
        names.MATMUL,
        (Plain(0), Packed((1, 2, 3), dequantize_levels, _product_shape, "product")),
        {},
        condition=_is_transposed,
        written_back=False,
    ),
    (MICROSOFT, "GatherBlockQuantized"): FloatForm(
        names.GATHER,
        (Packed((0, 2, 3), dequantize_table, unpacked_table_shape, "table"), Plain(1)),
        {"gather_axis": "axis"},
        condition=_fills_bytes,
    ),
    (MICROSOFT, "QMoE"): FloatForm(
        names.MIXTURE_OF_EXPERTS,
        _EXPERTS,
        {name: name for name in _EXPERT_ATTRIBUTES},
        domain=MICROSOFT,
        condition=_experts_in_order,
    ),
    (MICROSOFT, "QAttention"): FloatForm(
        names.ATTENTION,
        _ATTENTION,
        {name: name for name in _ATTENTION_ATTRIBUTES},
        domain=MICROSOFT,
        equal_widths=1,
    ),
    (MICROSOFT, "QEmbedLayerNormalization"): FloatForm(
        "EmbedLayerNormalization",
        (Plain(0), Plain(1), *(Quantized(k, k + 6, k + 11) for k in range(2, 7)), Plain(7)),
        {"epsilon": "epsilon"},
        domain=MICROSOFT,
    ),
    (MICROSOFT, "QLinearAdd"): _two_operands(names.ADD),
    (MICROSOFT, "QLinearMul"): _two_operands(names.MUL),
    (MICROSOFT, "QLinearConcat"): FloatForm(names.CONCAT, (Quantized(2, 3, 4),), output=(0, 1), repeated=True),
    (MICROSOFT, "QLinearSigmoid"): _pointwise("Sigmoid"),
    (MICROSOFT, "QLinearLeakyRelu"): _pointwise("LeakyRelu", ("alpha",)),
    (MICROSOFT, "QLinearSoftmax"): FloatForm(
        names.SOFTMAX, (Quantized(0, 1, 2),), {"axis": "axis"}, output=(3, 4), condition=_softmax_of_one_axis
    ),
    (MICROSOFT, "QLinearGlobalAveragePool"): FloatForm(
        "GlobalAveragePool", (Quantized(0, 1, 2),), {}, output=(3, 4), condition=_channels_first
    ),
}

DYNAMIC_QUANTIZERS = {("", "DynamicQuantizeLinear")}
"""Their outputs: the quantized input, its scale and its zero point, computed from the input."""

COMMUTING = {("", "MaxPool"), ("", "Resize")}
"""Beside movement: operators that do the same to quantized values of one scale as to the values themselves, up to
rounding."""

FILLING = {("", "Pad")}
"""Movement that fills in a number, which means another one among quantized values."""

NOT_NEGATIVE = {("", name) for name in ("Relu", "Softmax", "Sigmoid", "HardSigmoid", "Exp", "Abs", "Sqrt", "Softplus")}
"""Operators whose outputs are never below zero."""

_SIGN_KEEPERS = (
    *("Add", "Mul", "Div", "Max", "Cast", "Dropout"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax"),
)
KEEPS_SIGN = {("", name) for name in _SIGN_KEEPERS}
"""Operators whose outputs are not below zero where none of their float inputs are."""


def float_form(domain: str, op: str) -> FloatForm | None:
    """None: no rule says which float node it stands for."""
    return FLOAT_FORMS.get((domain, op))
