"""Quantized arrays as floats: (q - zero point) * scale, per tensor, along an axis, or in blocks; packed or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.types import AnyArray

UNPACKED_BITS = (2, 4, 8)  # several weights, or one, fill a byte

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
LEVELS = (
    (*_FP4, *(-level for level in _FP4)),
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
"""By ``quant_type`` of MatMulBnb4: what a code stands for, in units of the largest value of its block: a float of four
bits, or quantiles of a normal distribution (github.com/bitsandbytes-foundation/bitsandbytes)."""


def dequantize_array(
    quantized: AnyArray, scale: AnyArray, zero_point: AnyArray | None, axis: int, block: int = 0
) -> AnyArray:
    """As DequantizeLinear defines it, computed in float32, in the type of ``scale``.

    ``scale`` and ``zero_point`` are scalars, vectors along ``axis``, or of the rank of ``quantized`` with an entry per
    ``block`` entries along ``axis``. Raises UserError where their shapes fit none of these.
    """
    values = quantized.astype(np.int32) if quantized.dtype.itemsize < 4 and is_integer(quantized) else quantized
    if zero_point is not None:
        values = values - spread(np.asarray(zero_point).astype(values.dtype), quantized.shape, axis, block)
    spread_scale = spread(np.asarray(scale), quantized.shape, axis, block)
    return (values.astype(np.float32) * spread_scale.astype(np.float32)).astype(scale.dtype)


def is_integer(array: AnyArray) -> bool:
    """Types of four bits and fewer are no subtypes of numpy's integers."""
    return array.dtype.kind in "iu" or "int" in array.dtype.name


def spread(parameter: AnyArray, shape: tuple[int, ...], axis: int, block: int) -> AnyArray:
    """A scale or zero point in a shape that broadcasts to ``shape``. Raises UserError where there is none."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis %= len(shape)
    blocks = tuple(-(-size // block) if block and k == axis else size for k, size in enumerate(shape))
    if block and parameter.shape == blocks:
        return parameter.repeat(block, axis).take(np.arange(shape[axis]), axis)
    if parameter.size == shape[axis]:
        return parameter.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    raise misfit(parameter.shape, shape)


def misfit(scales: tuple[int, ...], weight: tuple[int, ...]) -> UserError:
    return UserError(f"scales of shape {list(scales)} do not fit a weight of shape {list(weight)}: the file is damaged")


def unpack(packed: AnyArray, bits: int, count: int) -> AnyArray:
    """The first ``count`` values along the last axis of bytes that hold several, lowest bits first; uint8."""
    per_byte = 8 // bits
    parts = [(packed >> (bits * k)) & ((1 << bits) - 1) for k in range(per_byte)]
    whole = np.stack(parts, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)
    return whole[..., :count].astype(np.uint8)


def dequantize_blocks(attributes: Mapping[str, Any], stored: tuple[AnyArray | None, ...]) -> AnyArray:
    """[K, N]: the weight of a MatMulNBits. ``stored``: packed weight, scales, zero points, group of each row.

    Without zero points they are in the middle of the range. Bits are among ``UNPACKED_BITS``.
    """
    packed, scales, zero_points, groups = stored
    rows, columns, block = (int(attributes[name]) for name in ("K", "N", "block_size"))
    bits = int(attributes.get("bits", 4))
    assert packed is not None
    assert scales is not None
    blocks = math.ceil(rows / block)
    if packed.size * 8 < rows * columns * bits or packed.size % columns or scales.size != columns * blocks:
        raise misfit(scales.shape, (rows, columns))
    values = unpack(packed.reshape(columns, -1), bits, rows).astype(np.float32)
    scale = scales.reshape(columns, blocks)
    zero: AnyArray = np.full((columns, blocks), 1 << (bits - 1), np.float32)
    if zero_points is not None and zero_points.dtype == np.uint8:
        zero = unpack(zero_points.reshape(columns, -1), bits, blocks).astype(np.float32)
    elif zero_points is not None:
        zero = zero_points.reshape(columns, blocks).astype(np.float32)
    group = np.arange(rows) // block if groups is None else groups.astype(np.int64)[:rows]
    weight = (values - zero[:, group]) * scale.astype(np.float32)[:, group]
    return np.ascontiguousarray(weight.T.astype(scales.dtype))


def dequantize_levels(attributes: Mapping[str, Any], stored: tuple[AnyArray | None, ...]) -> AnyArray:
    """[K, N]: the weight of a MatMulBnb4. ``stored``: two codes per byte of its transpose, row after row, the first in
    the high bits; the largest value of each block."""
    codes, largest, _ = stored
    rows, columns, block = (int(attributes[name]) for name in ("K", "N", "block_size"))
    assert codes is not None
    assert largest is not None
    if codes.size * 2 < rows * columns or largest.size * block < rows * columns:
        raise misfit(largest.shape, (rows, columns))
    levels = np.array(LEVELS[int(attributes["quant_type"])], np.float32)
    values = levels[np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[: rows * columns]]
    values = values * largest.astype(np.float32).repeat(block)[: values.size]
    return np.ascontiguousarray(values.reshape(columns, rows).T.astype(largest.dtype))


def dequantize_table(attributes: Mapping[str, Any], stored: tuple[AnyArray | None, ...]) -> AnyArray:
    """The table of a GatherBlockQuantized. ``stored``: its rows, scales, zero points.

    Without zero points, they are 0, and the middle of the range where bytes hold the values. Bits are among
    ``UNPACKED_BITS``.
    """
    table, scales, zero_points = stored
    bits, axis = int(attributes.get("bits", 4)), int(attributes.get("quantize_axis", 1))
    assert table is not None
    assert scales is not None
    if table.dtype == np.uint8:
        table = unpack(table, bits, table.shape[-1] * 8 // bits)
        if zero_points is None:
            zero_points = np.full((), 1 << (bits - 1), np.uint8)
        else:
            zero_points = unpack(zero_points, bits, scales.shape[-1])
    return dequantize_array(table, scales, zero_points, axis, int(attributes.get("block_size", 128)))
