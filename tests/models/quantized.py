"""Quantized forms of a model file, as onnxruntime's tools write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

Feeds = Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]
Writer = Callable[[Path, Path, Feeds], None]
"""(float model, quantized model to write, inputs to calibrate on)."""

PRODUCTS = ["MatMul", "Gemm", "Conv", "Gather"]


class OneBatch(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Feeds) -> None:
        self.batches = iter([dict(feeds)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def own_copy(source: Path, target: Path) -> Path:
    """``source`` beside ``target``: onnxruntime writes a file beside what it quantizes, and removes it, which another
    process that quantizes the same must not see."""
    return Path(shutil.copy(source, target.with_name(f"of_{target.name}")))


def dynamically(source: Path, target: Path, feeds: Feeds, **options: Any) -> None:
    quantization.quantize_dynamic(own_copy(source, target), target, **options)


def statically(source: Path, target: Path, feeds: Feeds, **options: Any) -> None:
    options = {"op_types_to_quantize": PRODUCTS, **options}
    quantization.quantize_static(own_copy(source, target), target, OneBatch(feeds), **options)


def optimized(source: Path, target: Path, feeds: Feeds, writer: Writer) -> None:
    """As onnxruntime saves the graph that it runs: integer products fused with their scales."""
    writer(source, target, feeds)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])


def by_blocks(source: Path, target: Path, feeds: Feeds, **options: Any) -> None:
    """Weights of few bits with a scale per block: MatMulNBits, GatherBlockQuantized or DequantizeLinear."""
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, **options)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


WITH_GATHER: dict[str, Any] = {
    "op_types_to_quantize": ("MatMul", "Gather"),
    "quant_axes": (("MatMul", 0), ("Gather", 1)),
}

FORMS: dict[str, Writer] = {
    "dynamic": dynamically,
    "dynamic_uint8": partial(dynamically, weight_type=quantization.QuantType.QUInt8),
    "dynamic_per_channel": partial(dynamically, per_channel=True),
    "dynamic_optimized": partial(optimized, writer=dynamically),
    "qdq": statically,
    "qdq_per_channel": partial(statically, per_channel=True),
    "qdq_uint8": partial(statically, activation_type=quantization.QuantType.QUInt8),
    "qdq_optimized": partial(optimized, writer=statically),
    "operators": partial(
        statically,
        quant_format=quantization.QuantFormat.QOperator,
        activation_type=quantization.QuantType.QUInt8,
    ),
    "int4_blocks": partial(by_blocks, is_symmetric=True),
    "uint4_blocks": partial(by_blocks, is_symmetric=False),
    "int8_blocks": partial(by_blocks, is_symmetric=False, bits=8),
    "int4_blocks_pairs": partial(by_blocks, is_symmetric=True, quant_format=quantization.QuantFormat.QDQ),
    "uint4_blocks_pairs": partial(by_blocks, is_symmetric=False, quant_format=quantization.QuantFormat.QDQ),
    "int4_blocks_and_table": partial(by_blocks, is_symmetric=True, **WITH_GATHER),
}
