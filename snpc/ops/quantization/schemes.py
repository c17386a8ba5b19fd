"""Quantized arrays that can be cut, and quantized anew: codes with their scales and zero points, and their range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from snpc.ops.quantization.arrays import dequantize_array, spread
from snpc.types import AnyArray, IntArray

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the range of a block that scales are tried for: cutting off an extreme rounds all others more finely."""
FEW_CODES = 64  # with more of them the whole range is best: its extremes cost more than they round


SMALLEST_BLOCK = 16  # that MatMulNBits and GatherBlockQuantized take


def common_block(kept: IntArray, block: int) -> int:
    """The largest blocks, by halving, into which the entries ``kept`` of an axis can be put in their order so that none
    holds entries of two former ones; 0 where they are smaller than kernels take."""
    size = block
    while size >= SMALLEST_BLOCK:
        former = kept // block
        if (former == former[np.arange(len(kept)) // size * size]).all():
            return size
        size = size // 2 if size % 2 == 0 else 0
    return 0


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

    def take(self, keep: Mapping[int, IntArray]) -> QuantizedArray:
        """The positions ``keep[axis]`` of each axis, codes as they are. A new block has the scale of the one that its
        first entry was in, which is that of all its entries where whole blocks stay."""
        codes, scale, zero = self.codes, self.scale, self.zero
        own = self.axis % codes.ndim
        for axis, kept in keep.items():
            codes = codes.take(kept, axis)
            entries = kept[:: self.block] // self.block if self.block and axis == own else kept
            scale, zero = (take_entries(p, self.codes.ndim, axis, own, entries) for p in (scale, zero))
        return replace(self, codes=codes, scale=scale, zero=zero)

    def in_blocks_of(self, block: int) -> QuantizedArray:
        """The same in smaller blocks, a divisor of those: each has the scale and zero point of the one around it."""
        size, times = self.codes.shape[self.axis], self.block // block
        entries = np.arange(-(-size // block)) // times
        scale, zero = (p if p.size == 1 else p.take(entries, self.axis) for p in (self.scale, self.zero))
        return replace(self, scale=scale, zero=zero, block=block)

    def quantize(self, array: AnyArray, scale: AnyArray | None = None) -> QuantizedArray:
        """``array``, of the shape of the codes, in the same scheme: range, axis, blocks, symmetric or not.

        ``scale``: where it is given. Else each scale is that with the least squared error among its own and those that
        take in ``SHARES`` of the range: what did not change keeps its codes.
        """
        values = array.astype(np.float32)
        best = self.rounded(values, self.scale if scale is None else scale, self.zero)
        if scale is not None:
            return best
        error = best.error(values)
        for share in SHARES if self.high - self.low < FEW_CODES else SHARES[:1]:
            other = self.rounded(values, *self.fitted(values, share))
            found = other.error(values)
            scales = np.where(found < error, other.scale, best.scale).astype(self.scale.dtype)
            zeros = np.where(found < error, other.zero, best.zero)
            best, error = self.rounded(values, scales, zeros), np.minimum(found, error)
        return best

    def rounded(self, values: AnyArray, scale: AnyArray, zero: AnyArray) -> QuantizedArray:
        """``values`` as codes of this scale and zero point."""
        zero = zero.astype(np.float32)
        divisor = spread(np.where(scale == 0, 1, scale).astype(np.float32), values.shape, self.axis, self.block)
        codes = np.rint(values / divisor) + spread(zero, values.shape, self.axis, self.block)
        return replace(self, codes=np.clip(codes, self.low, self.high).astype(np.int64), scale=scale, zero=zero)

    def error(self, values: AnyArray) -> AnyArray:
        """Squared error of all values that share a scale; of the shape of the scale."""
        return self.reduce(np.square(self.dequantize().astype(np.float32) - values), np.add)

    def fitted(self, values: AnyArray, share: float) -> tuple[AnyArray, AnyArray]:
        """(scale, zero point) that take in so large a ``share`` of the range of all values that share them."""
        least, most = (np.asarray(share * self.reduce(values, f)) for f in (np.minimum, np.maximum))
        least, most = np.minimum(least, 0), np.maximum(most, 0)
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

    def reduce(self, values: AnyArray, operation: np.ufunc) -> AnyArray:
        """``values`` reduced over all that share a scale; of the shape of the scale."""
        if self.block:
            starts = np.arange(0, values.shape[self.axis], self.block)
            return np.asarray(operation.reduceat(values, starts, axis=self.axis))
        if self.scale.size == 1:
            return np.reshape(operation.reduce(values, axis=None), self.scale.shape)
        others = tuple(k for k in range(values.ndim) if k != self.axis % values.ndim)
        return np.asarray(operation.reduce(values, axis=others))


def take_entries(parameter: AnyArray, rank: int, axis: int, own: int, entries: IntArray) -> AnyArray:
    """What a cut of ``axis`` leaves of a scale or zero point, which has entries along ``own``, or along all axes."""
    if parameter.size == 1:
        return parameter
    if parameter.ndim == rank and rank > 1:
        return parameter.take(entries, axis)
    return parameter.take(entries, parameter.ndim - 1) if axis == own else parameter
