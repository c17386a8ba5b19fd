"""What nodes on quantized or re-laid-out values cost. snpc does not look through them, but counts them.

Shapes are those of onnxruntime's page of contrib operators (github.com/microsoft/onnxruntime, folder docs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from snpc.ops.contraction import letter_sizes, matmul_letters
from snpc.ops.spec import MICROSOFT, OpCall
from snpc.types import Shape

NCHWC = "com.microsoft.nchwc"  # convolutions in onnxruntime's blocked layout, in files that it has optimized


@dataclass(frozen=True)
class ProductCost:
    """Of an opaque node: its multiply-accumulates, the inputs that are weights, the shapes of its outputs where onnx
    has no inference for it, and the input that its outputs have the type of."""

    macs: Callable[[OpCall], int]
    weights: tuple[int, ...]
    out_shapes: Callable[[OpCall], list[Shape]] | None = None
    dtype_input: int = 0


def matmul_sizes(call: OpCall, left: int, right: int) -> tuple[dict[str, int], str]:
    """(size of each letter, letters of the output) of a product of two inputs."""
    letters = matmul_letters(len(call.shape(left)), len(call.shape(right)))
    return letter_sizes(letters, call.shape(left), call.shape(right)), letters.out


def matmul(left: int, right: int, dtype_input: int | None = None) -> ProductCost:
    def macs(call: OpCall) -> int:
        return math.prod(matmul_sizes(call, left, right)[0].values())

    def out_shapes(call: OpCall) -> list[Shape]:
        sizes, out = matmul_sizes(call, left, right)
        return [tuple(sizes[letter] for letter in out)]

    if dtype_input is None:
        return ProductCost(macs, (left, right))
    return ProductCost(macs, (left, right), out_shapes, dtype_input)


def convolution(left: int, right: int) -> ProductCost:
    def macs(call: OpCall) -> int:
        return math.prod(call.out_shapes[0]) * math.prod(call.shape(right)[1:]) if call.out_shapes[0] else 0

    return ProductCost(macs, (left, right))


def _gemm_macs(call: OpCall) -> int:
    return math.prod(call.shape(0)) * call.shape(3)[0 if call.attrs.get("transB", 0) else 1]


def _packed_matmul_shape(call: OpCall) -> list[Shape]:
    return [(*call.shape(0)[:-1], int(call.attrs["N"]))]


def _packed_matmul_macs(call: OpCall) -> int:
    """The weight holds several values per byte; its size is in the attributes."""
    return math.prod(call.shape(0)) * int(call.attrs["N"])


def _attention_shape(call: OpCall) -> list[Shape]:
    batch, length, _ = call.shape(0)
    return [(batch, length, call.shape(1)[1] // 3)]


def _attention_macs(call: OpCall) -> int:
    """Queries, keys and values by one product, then scores and context, as in Attention."""
    batch, length, width = call.shape(0)
    projected = call.shape(1)[1]
    return batch * length * width * projected + 2 * batch * length * length * (projected // 3)


def _nothing(call: OpCall) -> int:
    return 0


COSTS: Mapping[tuple[str, str], ProductCost] = {
    ("", "DequantizeLinear"): ProductCost(_nothing, (0,)),
    (MICROSOFT, "DequantizeLinear"): ProductCost(_nothing, (0,)),
    (MICROSOFT, "GatherBlockQuantized"): ProductCost(_nothing, (0,)),
    ("", "MatMulInteger"): matmul(0, 1),
    ("", "QLinearMatMul"): matmul(0, 3),
    ("", "ConvInteger"): convolution(0, 1),
    ("", "QLinearConv"): convolution(0, 3),
    (MICROSOFT, "QLinearConv"): convolution(0, 3),
    (MICROSOFT, "MatMulInteger16"): matmul(0, 1),
    (MICROSOFT, "MatMulIntegerToFloat"): matmul(0, 1, dtype_input=2),
    (MICROSOFT, "DynamicQuantizeMatMul"): matmul(0, 1, dtype_input=0),
    (MICROSOFT, "QGemm"): ProductCost(_gemm_macs, (0, 3)),
    (MICROSOFT, "MatMulNBits"): ProductCost(_packed_matmul_macs, (1,), _packed_matmul_shape),
    (MICROSOFT, "QAttention"): ProductCost(_attention_macs, (1,), _attention_shape, dtype_input=3),
    (NCHWC, "Conv"): convolution(0, 1),
}
