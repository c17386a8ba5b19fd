"""What nodes on quantized or re-laid-out values cost. snpc does not look through them, but counts them.

Shapes are those of onnxruntime's page of contrib operators (github.com/microsoft/onnxruntime, folder docs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from snpc.ops.contraction import letter_sizes, matmul_letters
from snpc.ops.spec import MICROSOFT, OpCall
from snpc.types import Shape

NCHWC = "com.microsoft.nchwc"  # convolutions in onnxruntime's blocked layout, in files that it has optimized

WeightCount = Callable[[Mapping[str, Any], Shape, int], int]
"""(attributes, stored shape, bits of an entry) -> how many weights a packed constant holds."""


@dataclass(frozen=True)
class QuantizedCost:
    """Of a node on quantized values: its multiply-accumulates (None: not known), the inputs that hold weights where
    they are constants, and its bias. Its other constants are scales, zero points and indices.

    ``count`` is for packed weights. ``out_shapes``, where onnx has no inference for it; ``dtype_input``: the input that
    its outputs then have the type of.
    """

    macs: Callable[[OpCall], int] | None
    weights: tuple[int, ...]
    bias: int | None = None
    count: WeightCount | None = None
    out_shapes: Callable[[OpCall], list[Shape]] | None = None
    dtype_input: int = 0


def matmul_sizes(call: OpCall, left: int, right: int) -> tuple[dict[str, int], str]:
    """(size of each letter, letters of the output) of a product of two inputs."""
    letters = matmul_letters(len(call.shape(left)), len(call.shape(right)))
    return letter_sizes(letters, call.shape(left), call.shape(right)), letters.out


def matmul(left: int, right: int, bias: int | None = None, dtype_input: int | None = None) -> QuantizedCost:
    def macs(call: OpCall) -> int:
        return math.prod(matmul_sizes(call, left, right)[0].values())

    def out_shapes(call: OpCall) -> list[Shape]:
        sizes, out = matmul_sizes(call, left, right)
        return [tuple(sizes[letter] for letter in out)]

    if dtype_input is None:
        return QuantizedCost(macs, (left, right), bias)
    return QuantizedCost(macs, (left, right), bias, out_shapes=out_shapes, dtype_input=dtype_input)


def convolution(left: int, right: int, bias: int | None = None) -> QuantizedCost:
    def macs(call: OpCall) -> int:
        return math.prod(call.out_shapes[0]) * math.prod(call.shape(right)[1:]) if call.out_shapes[0] else 0

    return QuantizedCost(macs, (left, right), bias)


def _gemm_macs(call: OpCall) -> int:
    return math.prod(call.shape(0)) * call.shape(3)[0 if call.attrs.get("transB", 0) else 1]


def _packed_matmul_shape(call: OpCall) -> list[Shape]:
    return [(*call.shape(0)[:-1], int(call.attrs["N"]))]


def _packed_matmul_macs(call: OpCall) -> int:
    """The weight holds several values per byte; its size is in the attributes."""
    return math.prod(call.shape(0)) * int(call.attrs["N"])


def _product_size(attrs: Mapping[str, Any], stored: Shape, bits: int) -> int:
    """The blocks that are stored may reach beyond the last row."""
    return int(attrs["K"]) * int(attrs["N"])


def _values_per_entry(attrs: Mapping[str, Any], stored: Shape, bits: int) -> int:
    """Bytes hold several weights, unless a weight has eight bits; entries of a type of four bits hold one each."""
    return math.prod(stored) * bits // min(bits, int(attrs.get("bits", 4)))


def _expert_weights(attrs: Mapping[str, Any], stored: Shape, bits: int) -> int:
    """Biases are floats."""
    return (
        math.prod(stored) if bits > 8 else _values_per_entry({"bits": attrs.get("expert_weight_bits", 4)}, stored, bits)
    )


def _routed_macs(call: OpCall) -> int:
    """Every token goes through the experts that are chosen for it."""
    *tokens, experts = call.shape(1)
    weights = sum(_expert_weights(call.attrs, call.shape(k), call.bits[k]) for k in (2, 5, 8) if call.has(k))
    return math.prod(tokens) * int(call.attrs.get("k", 1)) * weights // experts


def unpacked_table_shape(attrs: Mapping[str, Any], stored: Shape, bits: int) -> Shape:
    """The shape of a table of which the last axis is packed. ``bits``: of a stored entry."""
    *outer, last = stored
    return (*outer, _values_per_entry(attrs, (last,), bits))


def _gathered_rows_shape(call: OpCall) -> list[Shape]:
    axis = int(call.attrs.get("gather_axis", 0))
    unpacked = unpacked_table_shape(call.attrs, call.shape(0), call.bits[0])
    return [(*unpacked[:axis], *call.shape(1), *unpacked[axis + 1 :])]


def _attention_shape(call: OpCall) -> list[Shape]:
    batch, length, _ = call.shape(0)
    return [(batch, length, call.shape(1)[1] // 3)]


def _attention_macs(call: OpCall) -> int:
    """Queries, keys and values by one product, then scores and context, as in Attention."""
    batch, length, width = call.shape(0)
    projected = call.shape(1)[1]
    return batch * length * width * projected + 2 * batch * length * length * (projected // 3)


def _embedding_shapes(call: OpCall) -> list[Shape]:
    """Of the embeddings, and of the number of tokens of each sample."""
    batch, length = call.shape(0)
    return [(batch, length, call.shape(2)[1]), (batch,)]


def _nothing(call: OpCall) -> int:
    return 0


def _first_shape(call: OpCall) -> list[Shape]:
    return [call.shape(0)]


def _like_first(dtype_input: int) -> QuantizedCost:
    return QuantizedCost(_nothing, (0,), out_shapes=_first_shape, dtype_input=dtype_input)


COSTS: Mapping[tuple[str, str], QuantizedCost] = {
    ("", "DequantizeLinear"): QuantizedCost(_nothing, (0,)),
    ("", "QuantizeLinear"): QuantizedCost(_nothing, (0,)),
    ("", "DynamicQuantizeLinear"): QuantizedCost(_nothing, (0,)),
    ("", "MatMulInteger"): matmul(0, 1),
    ("", "QLinearMatMul"): matmul(0, 3),
    ("", "ConvInteger"): convolution(0, 1),
    ("", "QLinearConv"): convolution(0, 3, bias=8),
    (MICROSOFT, "DequantizeLinear"): _like_first(dtype_input=1),
    (MICROSOFT, "QuantizeLinear"): _like_first(dtype_input=2),
    (MICROSOFT, "GatherBlockQuantized"): QuantizedCost(
        _nothing, (0,), count=_values_per_entry, out_shapes=_gathered_rows_shape, dtype_input=2
    ),
    (MICROSOFT, "QLinearConv"): convolution(0, 3, bias=8),
    (MICROSOFT, "MatMulInteger16"): matmul(0, 1),
    (MICROSOFT, "MatMulIntegerToFloat"): matmul(0, 1, bias=6, dtype_input=2),
    (MICROSOFT, "DynamicQuantizeMatMul"): matmul(0, 1, bias=4, dtype_input=0),
    (MICROSOFT, "QGemm"): QuantizedCost(_gemm_macs, (0, 3), 6),
    (MICROSOFT, "MatMulNBits"): QuantizedCost(_packed_matmul_macs, (1,), 5, _product_size, _packed_matmul_shape),
    (MICROSOFT, "MatMulBnb4"): QuantizedCost(_packed_matmul_macs, (1,), None, _product_size, _packed_matmul_shape),
    (MICROSOFT, "QMoE"): QuantizedCost(_routed_macs, (2, 5, 8, 4, 7, 10), None, _expert_weights, _first_shape),
    (MICROSOFT, "QAttention"): QuantizedCost(_attention_macs, (1,), 2, None, _attention_shape, dtype_input=3),
    (MICROSOFT, "QLinearAdd"): QuantizedCost(None, (0, 3)),
    (MICROSOFT, "QLinearMul"): QuantizedCost(None, (0, 3)),
    (MICROSOFT, "QEmbedLayerNormalization"): QuantizedCost(
        None, (2, 3, 4, 5, 6), out_shapes=_embedding_shapes, dtype_input=8
    ),
    (NCHWC, "Conv"): convolution(0, 1, bias=2),
}
