"""Quantized arrays that can be cut, and quantized anew: codes with their scales and zero points, and their range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from snpc.ops.quantization.arrays import dequantize_array, spread
from snpc.types import AnyArray, IntArray

BIAS_BITS = 32


@dataclass(frozen=True)
class QuantizedArray:
    """``(codes - zero) * scale``. ``scale`` and ``zero`` are scalars, vectors along ``axis``, or have an entry per
    ``block`` entries along it. ``low`` and ``high``: what a code can be; ``symmetric``: zero stays where it is."""

    codes: AnyArray
    scale: AnyArray
    zero: AnyArray
    axis: int
    block: int
    low: int
    high: int
    symmetric: bool

    def dequantize(self) -> AnyArray:
        """The floats, as runtimes make them."""
        return dequantize_array(self.codes, self.scale, self.zero, self.axis, self.block)

    def take(self, keep: Mapping[int, IntArray]) -> QuantizedArray | None:
        """The positions ``keep[axis]`` of each axis, codes as they are; None where blocks would fall apart."""
        codes, scale, zero = self.codes, self.scale, self.zero
        own = self.axis % codes.ndim
        for axis, kept in keep.items():
            codes = codes.take(kept, axis)
            entries = kept
            if self.block and axis == own:
                whole = whole_blocks(kept, self.block, self.codes.shape[axis])
                if whole is None:
                    return None
                entries = whole
            scale, zero = (take_entries(p, self.codes.ndim, axis, own, entries) for p in (scale, zero))
        return replace(self, codes=codes, scale=scale, zero=zero)

    def quantize(self, array: AnyArray, scale: AnyArray | None = None) -> QuantizedArray:
        """``array`` in the same scheme: range, axis, blocks, symmetric or not. ``scale``: where it is given; else each
        scale takes in all that shares it. The extreme of a block gets the lowest code where stored blocks do so."""
        values = array.astype(np.float32)
        zero = self.zero
        if scale is None:
            scale, zero = self.fitted(values)
        zero = zero.astype(np.float32)
        divisor = spread(np.where(scale == 0, 1, scale).astype(np.float32), array.shape, self.axis, self.block)
        codes = np.rint(values / divisor) + spread(zero, array.shape, self.axis, self.block)
        return replace(self, codes=np.clip(codes, self.low, self.high).astype(np.int64), scale=scale, zero=zero)

    def fitted(self, values: AnyArray) -> tuple[AnyArray, AnyArray]:
        """(scale, zero point) that take in all values that share them."""
        least, most = self.extremes(values)
        kind = self.scale.dtype
        if self.symmetric:
            middle = float(self.zero.reshape(-1)[0]) if self.zero.size else 0.0
            if (self.scale.astype(np.float32) < 0).any():
                scale = np.where(-least > most, least, most) / (self.low - middle)
            else:
                scale = np.maximum(-least, most) / (self.high - middle)
            return scale.astype(kind), np.full(scale.shape, middle, np.float32)
        scale = ((most - least) / (self.high - self.low)).astype(kind)
        zero = np.rint(self.low - least / np.where(scale == 0, 1, scale).astype(np.float32))
        return scale, np.clip(zero, self.low, self.high)

    def extremes(self, values: AnyArray) -> tuple[AnyArray, AnyArray]:
        """(least, most) of the values that share a scale, zero among them; of the shape of the scale."""
        if self.scale.size == 1 and not self.block and self.scale.ndim == 0:
            return np.minimum(values.min(initial=0), 0), np.maximum(values.max(initial=0), 0)
        axis = self.axis % values.ndim
        if self.block:
            starts = np.arange(0, values.shape[axis], self.block)
            least, most = (f.reduceat(values, starts, axis=axis) for f in (np.minimum, np.maximum))
        elif self.scale.size == 1:
            least, most = (np.reshape(f(values), self.scale.shape) for f in (np.min, np.max))
        else:
            others = tuple(k for k in range(values.ndim) if k != axis)
            least, most = values.min(others), values.max(others)
        return np.minimum(least, 0), np.maximum(most, 0)


def whole_blocks(kept: IntArray, block: int, size: int) -> IntArray | None:
    """The blocks that positions ``kept`` are, of an axis of ``size`` entries; None where one is kept in part, or moves
    behind a shorter one."""
    blocks = list(dict.fromkeys((kept // block).tolist()))
    ends = [(b * block, min((b + 1) * block, size)) for b in blocks]
    wanted = np.concatenate([np.arange(*end) for end in ends]) if ends else np.zeros(0, np.int64)
    is_whole = np.array_equal(wanted, kept) and all(end - start == block for start, end in ends[:-1])
    return np.asarray(blocks, np.int64) if is_whole else None


def take_entries(parameter: AnyArray, rank: int, axis: int, own: int, entries: IntArray) -> AnyArray:
    """What a cut of ``axis`` leaves of a scale or zero point, which has entries along ``own``, or along all axes."""
    if parameter.size == 1:
        return parameter
    if parameter.ndim == rank and rank > 1:
        return parameter.take(entries, axis)
    return parameter.take(entries, parameter.ndim - 1) if axis == own else parameter
