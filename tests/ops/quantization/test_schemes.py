"""Quantized arrays: cut as they are, and quantized anew in their scheme."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from snpc.ops.quantization.schemes import SHARES, QuantizedArray

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
SCALINGS = {"tensor": (-1, 0, ()), "rows": (0, 0, (64,)), "columns": (1, 0, (6,)), "blocks": (0, 16, (4, 6))}


def make(kind: str, bits: int = 4, symmetric: bool = False) -> QuantizedArray:
    """[64, 6] random codes."""
    axis, block, shape = SCALINGS[kind]
    high = (1 << bits) - 1
    scale = RNG.uniform(0.5, 2, shape).astype(np.float32)
    zero = np.full(shape, 1 << (bits - 1)) if symmetric else RNG.integers(1, high, shape)
    codes = RNG.integers(0, high + 1, (64, 6))
    return QuantizedArray(codes, scale, np.asarray(zero, np.float32), axis, block, 0, high, symmetric)


@pytest.mark.parametrize("kind", SCALINGS)
def test_codes_that_are_taken_stand_for_what_is_taken(kind: str) -> None:
    array = make(kind)
    rows = np.concatenate([np.arange(32, 48), np.arange(16)])
    keep = {0: rows, 1: np.array([5, 0, 2])}
    taken = array.take(keep)
    np.testing.assert_array_equal(taken.dequantize(), array.dequantize()[rows][:, [5, 0, 2]])
    np.testing.assert_array_equal(taken.codes, array.codes[rows][:, [5, 0, 2]])


def test_a_cut_through_blocks_changes_what_codes_stand_for() -> None:
    array = make("blocks")
    assert not np.array_equal(array.take({0: np.arange(1, 64)}).dequantize(), array.dequantize()[1:])


def test_blocks_of_unchanged_values_keep_their_codes() -> None:
    """The first block stays as it is, the next ones consist of parts of two."""
    array, rows = make("blocks"), np.r_[0:16, 24:64]
    wanted = array.dequantize()[rows]
    found = array.take({0: rows}).quantize(wanted)
    np.testing.assert_array_equal(found.codes[:16], array.codes[:16])
    np.testing.assert_array_equal(found.scale[0], array.scale[0])
    assert not np.array_equal(found.dequantize()[16:], wanted[16:])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rounding_is_by_half_a_step_at_most(kind: str, bits: int, symmetric: bool) -> None:
    """Of the scale that takes in all values; a narrower one is taken only where the sum of squares gets smaller."""
    scheme = make(kind, bits, symmetric)
    values = RNG.standard_normal((64, 6)).astype(np.float32)
    whole = scheme.rounded(values, *scheme.fitted(values, 1.0))
    steps = replace(whole, codes=np.ones_like(whole.codes), zero=np.zeros_like(whole.zero)).dequantize()
    assert (np.abs(whole.dequantize() - values) <= (0.5 if symmetric else 1.0) * np.abs(steps) + 1e-6).all()
    found = scheme.quantize(values)
    assert (found.error(values) <= whole.error(values) + 1e-6).all()
    assert found.codes.min() >= 0
    assert found.codes.max() < 1 << bits
    assert found.scale.shape == scheme.scale.shape
    if symmetric:
        np.testing.assert_array_equal(found.zero, np.full(found.zero.shape, 1 << (bits - 1)))


def test_each_block_gets_the_share_that_rounds_it_best() -> None:
    scheme = make("blocks", symmetric=True)
    values = RNG.standard_normal((64, 6)).astype(np.float32)
    tried = [scheme.rounded(values, *scheme.fitted(values, share)).error(values) for share in SHARES]
    np.testing.assert_allclose(scheme.quantize(values).error(values), np.min(tried, 0), rtol=1e-5)
    assert (np.min(tried, 0) < tried[0]).any()


def test_the_extreme_gets_the_lowest_code_where_stored_scales_are_negative() -> None:
    """As onnxruntime quantizes symmetric blocks: a code more on the side of the extreme."""
    scheme = make("tensor", symmetric=True)
    signed = replace(scheme, scale=-scheme.scale)
    values = np.linspace(-0.5, 1, 384, dtype=np.float32).reshape(64, 6)
    scale, _ = signed.fitted(values, 1.0)
    assert scale == pytest.approx(-1 / 8)
    assert signed.rounded(values, scale, signed.zero).codes[-1, -1] == 0


def test_a_block_of_zeros_stays_zero() -> None:
    for symmetric in (False, True):
        found = make("blocks", symmetric=symmetric).quantize(np.zeros((64, 6), np.float32))
        assert not found.dequantize().any()


def test_a_given_scale_stays() -> None:
    scheme = make("columns", bits=8)
    scale = np.full(6, 0.25, np.float32)
    found = scheme.quantize(np.zeros((64, 6), np.float32), scale)
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.zero, scheme.zero)
