"""Layouts: what is read and written back is the same, byte for byte, and stands for what onnxruntime makes of it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from snpc.ops.quantization.arrays import dequantize_blocks, dequantize_table
from snpc.ops.quantization.layouts import pack, read_stored, write_stored

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def product(bits: int, flat: bool, zeros: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """A MatMulNBits of 40 rows in blocks of 16, and 3 columns; entries behind the last row are zero points."""
    attributes = {"K": 40, "N": 3, "bits": bits, "block_size": 16}
    zero = (
        RNG.integers(0, 1 << bits, (3, 3), np.uint8) if zeros == "bytes" else np.full((3, 3), 1 << (bits - 1), np.uint8)
    )
    codes = RNG.integers(0, 1 << bits, (3, 48), np.uint8)
    codes[:, 40:] = zero[:, 2:]
    scale = RNG.uniform(0.5, 1, (3, 3)).astype(np.float32)
    stored: dict[str, Array] = {"codes": pack(codes, bits).reshape(3, 3, -1), "scale": scale.ravel() if flat else scale}
    if zeros == "bytes":
        stored["zero"] = pack(zero, bits).ravel() if flat else pack(zero, bits)
    elif zeros == "floats":
        stored["zero"] = zero.astype(np.float32)
    return attributes, stored


@pytest.mark.parametrize("zeros", ["", "bytes", "floats"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_in_blocks(bits: int, flat: bool, zeros: str) -> None:
    attributes, stored = product(bits, flat, zeros)
    array = read_stored("product", stored, attributes, -1, 0)
    expected = dequantize_blocks(attributes, (stored["codes"], stored["scale"], stored.get("zero"), None))
    np.testing.assert_array_equal(array.dequantize(), expected)
    assert_same(write_stored("product", array, stored, attributes), stored)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_tables(bits: int, zeros: bool) -> None:
    attributes = {"bits": bits, "block_size": 16, "quantize_axis": 1}
    stored: dict[str, Array] = {
        "codes": RNG.integers(0, 256, (5, 32 * bits // 8), np.uint8),
        "scale": RNG.uniform(0.5, 1, (5, 2)).astype(np.float32),
    }
    if zeros:
        stored["zero"] = pack(RNG.integers(0, 1 << bits, (5, 2), np.uint8), bits)
    array = read_stored("table", stored, attributes, 0, 0)
    expected = dequantize_table(attributes, (stored["codes"], stored["scale"], stored.get("zero")))
    np.testing.assert_array_equal(array.dequantize(), expected)
    assert_same(write_stored("table", array, stored, attributes), stored)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("layout", ["tensor", "table"])
def test_tensors_of_codes(kind: Any, layout: Any) -> None:
    low, high = int(ml_dtypes.iinfo(kind).min), int(ml_dtypes.iinfo(kind).max)  # type: ignore[no-untyped-call]
    codes = RNG.integers(low, high + 1, (8, 32)).astype(kind)
    scale = RNG.uniform(0.5, 1, (8, 2)).astype(np.float32)
    stored = {"codes": codes, "scale": scale, "zero": RNG.integers(low, high + 1, (8, 2)).astype(kind)}
    if layout == "table" and kind == np.uint8:
        pytest.skip("bytes of a table are packed")
    array = read_stored(layout, stored, {"quantize_axis": 1, "block_size": 16}, 1, 16)
    assert (array.low, array.high, array.symmetric) == (low, high, False)
    assert_same(write_stored(layout, array, stored, {}), stored)


def test_scalars_stay_scalars() -> None:
    """Operators on bytes take no vectors of one entry."""
    stored = {"codes": np.ones((2, 3), np.int8), "scale": np.asarray(0.5, np.float32), "zero": np.asarray(1, np.int8)}
    assert_same(write_stored("tensor", read_stored("tensor", stored, {}, 1, 0), stored, {}), stored)


def test_the_scale_of_a_bias_is_a_product() -> None:
    stored = {
        "codes": np.array([100, -50], np.int32),
        "input_scale": np.float32(0.5),
        "scale": np.array([0.1, 0.2], np.float32),
    }
    array = read_stored("bias", {k: np.asarray(v) for k, v in stored.items()}, {"alpha": 2.0}, 0, 0)
    np.testing.assert_allclose(array.dequantize(), [10, -10], rtol=1e-6)
    assert_same(write_stored("bias", array, {"codes": stored["codes"]}, {}), {"codes": stored["codes"]})


def assert_same(written: dict[str, Array], stored: dict[str, Array]) -> None:
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert (array.dtype, array.shape) == (stored[name].dtype, stored[name].shape)
        np.testing.assert_array_equal(array, stored[name])
