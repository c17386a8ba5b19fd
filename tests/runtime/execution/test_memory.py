"""Memory limits as users write them, arrays beyond a limit in files, and what running a model takes."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from snpc.errors import UserError
from snpc.runtime.execution import memory
from snpc.runtime.execution.memory import (
    SpillableStore,
    memory_budget,
    model_weights,
    parse_bytes,
    session_bytes,
    too_large_reason,
)
from snpc.runtime.io import spill_files
from snpc.types import Model


def test_sizes_in_bytes() -> None:
    assert parse_bytes("2GB") == 2 * 10**9
    assert parse_bytes(" 1.5 GiB ") == 3 * 2**29
    assert parse_bytes("500m") == 5 * 10**8
    assert parse_bytes("1000") == 1000
    for text in ("", "two", "-1GB", "0", "1XB", "GB", "1e9"):
        with pytest.raises(UserError, match="no size"):
            parse_bytes(text)


def test_without_a_limit_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1001)
    assert memory_budget(None) == 500
    assert memory_budget(7) == 7


def test_a_store_keeps_within_its_limit() -> None:
    store = SpillableStore(100)
    first = store.keep(np.zeros(10))
    second = store.keep(np.arange(10.0))
    assert (store.bytes_in_memory, store.bytes_in_files) == (80, 80)
    np.testing.assert_array_equal(second, np.arange(10.0))
    second += 1
    np.testing.assert_array_equal(second, np.arange(1.0, 11.0))
    del first
    gc.collect()
    assert store.bytes_in_memory == 0
    third = store.keep(np.zeros(10))  # there is room again
    assert (store.bytes_in_memory, store.bytes_in_files) == (third.nbytes, 80)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_arrays_of_any_shape_are_spilled(shape: tuple[int, ...]) -> None:
    store = SpillableStore(0)
    kept = store.keep(np.full(shape, 3.0))
    assert kept.shape == shape and (kept == 3).all()
    assert store.bytes_in_files == kept.nbytes


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill_files, "reserve", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        SpillableStore(0).keep(np.zeros(3))


def model_of(*tensors: ir.TensorProtocol) -> Model:
    """A model with these weights, the same one more than once where it is named more than once."""
    values = [ir.Value(name=f"w{k}", const_value=tensor) for k, tensor in enumerate(tensors)]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g")
    return Model(Path("model.onnx"), ir.Model(graph, ir_version=10), "", (), ())


def test_half_precision_runs_as_single() -> None:
    single = ir.Tensor(np.zeros((10, 10), np.float32))
    half = ir.Tensor(np.zeros((10, 10), np.float16))
    assert session_bytes(model_weights(model_of(single).graph)) == 400
    assert session_bytes(model_weights(model_of(half).graph)) == 600  # 200 as they are and 400 as floats
    assert session_bytes(model_weights(model_of(single, single, half).graph)) == 1000  # a shared tensor counts once


def test_a_model_may_take_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [ir.Tensor(np.zeros(1 << 20, np.float32))]
    monkeypatch.setattr(memory, "free_memory", lambda: 2 << 22)
    assert too_large_reason(weights) == ""
    monkeypatch.setattr(memory, "free_memory", lambda: (2 << 22) - 2)
    assert "takes about 0.0 GiB of memory, 0.0 GiB are free" in too_large_reason(weights)
