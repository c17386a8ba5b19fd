"""How quantized arrays lie in a file: as tensors of codes, in the blocks of MatMulNBits, or as packed tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from snpc.ops.quantization.arrays import misfit, unpack
from snpc.ops.quantization.schemes import QuantizedArray
from snpc.types import AnyArray

Layout = Literal["tensor", "product", "table", "experts", "bias"]
"""Of a constant: codes in its shape; the weight [K, N] of a MatMulNBits; the table of a GatherBlockQuantized; the
weights [experts, N, K] of a QMoE; a bias of int32, whose scale is a product of two."""

StoredParts = Mapping[str, AnyArray]
"""Part ("codes", "scale", "zero") -> what the file holds. A bias has the scale of its input too ("input_scale")."""


def read_stored(
    layout: Layout, stored: StoredParts, attributes: Mapping[str, Any], axis: int, block: int
) -> QuantizedArray:
    """The codes in the shape of the float constant, with scales and zero points to match. ``attributes``: of the node
    that reads them; ``axis`` and ``block``: of codes in their own shape."""
    match layout:
        case "tensor":
            return read_tensor(stored, axis, block)
        case "product":
            return read_product(stored, attributes)
        case "table":
            return read_table(stored, attributes)
        case "experts":
            return read_experts(stored, attributes)
        case "bias":
            alpha = np.float32(attributes.get("alpha", 1))
            scale: AnyArray = (
                stored["input_scale"].astype(np.float32) * stored["scale"].astype(np.float32) * alpha
            ).reshape(-1)
            scale = scale.reshape(()) if scale.size == 1 else scale
            return read_tensor({"codes": stored["codes"], "scale": scale}, -1, 0)


def write_stored(
    layout: Layout, array: QuantizedArray, stored: StoredParts, attributes: Mapping[str, Any]
) -> dict[str, AnyArray]:
    """The parts of ``array`` as ``stored`` lies in the file."""
    match layout:
        case "tensor":
            parts = {"codes": array.codes, "scale": array.scale, "zero": array.zero}
        case "product":
            parts = write_product(array, stored, int(attributes.get("bits", 4)))
        case "table":
            parts = write_table(array, stored, int(attributes.get("bits", 4)))
        case "experts":
            parts = write_experts(array, stored, int(attributes["bits"]))
        case "bias":
            parts = {"codes": array.codes}
    return {name: np.array(parts[name], stored[name].dtype, order="C") for name in parts if name in stored}


def code_range(dtype: Any) -> tuple[int, int]:
    limits = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(limits.min), int(limits.max)


def middle(low: int, high: int) -> int:
    """The zero point of a symmetric range."""
    return (low + high + 1) // 2


def read_tensor(stored: StoredParts, axis: int, block: int) -> QuantizedArray:
    codes, scale = stored["codes"], stored["scale"]
    low, high = code_range(codes.dtype)
    zero = stored.get("zero", np.zeros((), np.float32))
    symmetric = "zero" not in stored or bool((zero.astype(np.int64) == middle(low, high)).all())
    return QuantizedArray(codes.astype(np.int64), scale, zero.astype(np.float32), axis, block, low, high, symmetric)


def read_product(stored: StoredParts, attributes: Mapping[str, Any]) -> QuantizedArray:
    rows, columns, block = (int(attributes[name]) for name in ("K", "N", "block_size"))
    bits = int(attributes.get("bits", 4))
    blocks, center = -(-rows // block), 1 << (bits - 1)
    codes = unpack(stored["codes"].reshape(columns, -1), bits, rows).T.astype(np.int64)
    scale = stored["scale"].reshape(columns, blocks).T
    zero: AnyArray = np.full((blocks, columns), center, np.float32)
    if "zero" in stored:
        packed = stored["zero"]
        zero = (
            unpack(packed.reshape(columns, -1), bits, blocks).T
            if packed.dtype == np.uint8
            else packed.reshape(columns, blocks).T
        )
    high = (1 << bits) - 1
    return QuantizedArray(codes, scale, zero.astype(np.float32), 0, block, 0, high, "zero" not in stored)


def write_product(array: QuantizedArray, stored: StoredParts, bits: int) -> dict[str, AnyArray]:
    """Codes beyond the last row are zero points."""
    rows, columns = array.codes.shape
    blocks = array.scale.shape[0]
    codes = np.repeat(array.zero, array.block, 0).T.astype(np.uint8)
    codes[:, :rows] = array.codes.T
    parts = {
        "codes": pack(codes, bits).reshape(columns, blocks, array.block * bits // 8),
        "scale": array.scale.T.reshape(-1 if stored["scale"].ndim == 1 else (columns, blocks)),
    }
    if "zero" in stored:
        zero = stored["zero"]
        rounded = pack(array.zero.T.astype(np.uint8), bits) if zero.dtype == np.uint8 else array.zero.T
        parts["zero"] = rounded.reshape(-1) if zero.ndim == 1 else rounded
    return parts


def read_table(stored: StoredParts, attributes: Mapping[str, Any]) -> QuantizedArray:
    codes, scale, bits = stored["codes"], stored["scale"], int(attributes.get("bits", 4))
    zero, packed = stored.get("zero"), stored["codes"].dtype == np.uint8
    low, high = (0, (1 << bits) - 1) if packed else code_range(codes.dtype)
    if packed:
        codes = unpack(codes, bits, codes.shape[-1] * 8 // bits)
        zero = None if zero is None else unpack(zero, bits, scale.shape[-1])
    if zero is None:
        zero = np.full((), middle(low, high), np.float32)
    axis, block = int(attributes.get("quantize_axis", 1)), int(attributes.get("block_size", 128))
    return QuantizedArray(
        codes.astype(np.int64), scale, zero.astype(np.float32), axis, block, low, high, "zero" not in stored
    )


def write_table(array: QuantizedArray, stored: StoredParts, bits: int) -> dict[str, AnyArray]:
    parts = {"codes": array.codes, "scale": array.scale, "zero": array.zero}
    if stored["codes"].dtype != np.uint8:
        return parts
    packed = {name: pack(parts[name].astype(np.uint8), bits) for name in ("codes", "zero") if name in stored}
    return {**packed, "scale": array.scale}


def read_experts(stored: StoredParts, attributes: Mapping[str, Any]) -> QuantizedArray:
    """Where a row has one scale, it is one block."""
    packed, bits = stored["codes"], int(attributes["bits"])
    experts, rows, size = packed.shape
    codes = unpack(packed, bits, size * 8 // bits)
    scale = stored["scale"].reshape(experts, rows, -1)
    block = int(attributes.get("block_size", 0)) if stored["scale"].ndim == 3 else codes.shape[-1]
    if scale.shape[-1] * block != codes.shape[-1]:
        raise misfit(stored["scale"].shape, codes.shape)
    zero: AnyArray = np.full((), 1 << (bits - 1), np.float32)
    if "zero" in stored:
        count = scale.shape[-1] if stored["zero"].ndim == 3 else rows
        zero = unpack(stored["zero"], bits, count).reshape(scale.shape).astype(np.float32)
    return QuantizedArray(codes, scale, zero, 2, block, 0, (1 << bits) - 1, "zero" not in stored)


def write_experts(array: QuantizedArray, stored: StoredParts, bits: int) -> dict[str, AnyArray]:
    blocked = stored["scale"].ndim == 3
    parts = {
        "codes": pack(array.codes.astype(np.uint8), bits),
        "scale": array.scale if blocked else array.scale[..., 0],
    }
    if "zero" in stored:
        zero = array.zero.astype(np.uint8)
        parts["zero"] = pack(zero if stored["zero"].ndim == 3 else zero[..., 0], bits)
    return parts


def pack(values: AnyArray, bits: int) -> AnyArray:
    """Bytes that hold several values along the last axis, lowest bits first; the last byte is filled up with zeros."""
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    parts = padded.reshape(*padded.shape[:-1], -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return np.asarray(np.bitwise_or.reduce(parts << shifts, axis=-1), np.uint8)
