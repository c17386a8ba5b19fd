"""Parts of calibration data: they hold the batches of the whole, and pass from process to process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from snpc.errors import UserError
from snpc.runtime.calibration import Calibration, DataPart, load_calibration
from snpc.types import AnyArray, TensorSpec

X = TensorSpec("x", np.dtype(np.float32), ("batch", 4))
SIDE = TensorSpec("side", np.dtype(np.float32), (3,))
IMAGE = TensorSpec("image", np.dtype(np.float32), ("batch", 3, 8, 8))
SAMPLES, BATCH = 22, 2


def numbers() -> AnyArray:
    return np.arange(SAMPLES * 4, dtype=np.float32).reshape(SAMPLES, 4)


def as_npz(folder: Path) -> Any:
    np.savez(folder / "calib.npz", x=numbers(), side=np.ones(3, np.float32))
    return folder / "calib.npz"


def as_folder(folder: Path) -> Any:
    for number, rows in enumerate(np.split(numbers(), 11)):
        np.savez(folder / f"{number}.npz", x=rows, side=np.ones(3, np.float32))
    return folder


def as_test_sets(folder: Path) -> Any:
    for number, rows in enumerate(np.split(numbers(), 11)):
        place = folder / f"test_data_set_{number}"
        place.mkdir()
        for index, (name, array) in enumerate((("x", rows), ("side", np.ones(3, np.float32)))):
            onnx.save_tensor(numpy_helper.from_array(array, name), place / f"input_{index}.pb")
    return folder


def as_arrays(folder: Path) -> Any:
    return {"x": numbers(), "side": np.ones(3, np.float32)}


def as_dicts(folder: Path) -> Any:
    return [{"x": row, "side": np.ones(3, np.float32)} for row in numbers()[:, None]]


SOURCES: list[Callable[[Path], Any]] = [as_npz, as_folder, as_test_sets, as_arrays, as_dicts]


def loaded(source: Any, samples: int = 19) -> Calibration:
    return load_calibration(source, [X, SIDE], samples=samples, batch=BATCH, held_out=2, seed=3)


def sent(calibration: Calibration) -> Calibration:
    """As another process gets it."""
    received: Calibration = pickle.loads(pickle.dumps(calibration))
    return received


def same_batches(found: list[dict[str, AnyArray]], expected: list[dict[str, AnyArray]]) -> None:
    assert len(found) == len(expected) > 0
    for mine, other in zip(found, expected, strict=True):
        assert set(mine) == set(other)
        for name, array in other.items():
            np.testing.assert_array_equal(mine[name], array)


@pytest.mark.parametrize("source", SOURCES, ids=lambda make: make.__name__)
def test_a_slice_has_the_batches_of_the_whole_in_another_process(source: Any, tmp_path: Path) -> None:
    calibration = loaded(source(tmp_path))
    whole, part = list(calibration.batches()), sent(calibration.slice(3, 6))
    same_batches(list(part.batches()), whole[3:6])
    assert part.batch_text(0) == calibration.batch_text(3)
    assert part.samples == sum(len(feeds["x"]) for feeds in whole[3:6])


@pytest.mark.parametrize("source", SOURCES, ids=lambda make: make.__name__)
def test_the_parts_are_the_whole(source: Any, tmp_path: Path) -> None:
    calibration = loaded(source(tmp_path))
    for count in (1, 2, 3, 5):
        parts = [calibration.shard(index, count) for index in range(1, count + 1)]
        same_batches([feeds for part in parts for feeds in part.batches()], list(calibration.batches()))
        assert sum(part.samples for part in parts) == calibration.samples
        assert [part.part for part in parts] == [DataPart(calibration.origin, k + 1, count) for k in range(count)]
        assert all(len(part.batch_plan) % 2 == 0 for part in parts[:-1])


def test_a_slice_of_data_in_memory_carries_its_rows_alone(tmp_path: Path) -> None:
    large = {"x": np.zeros((4000, 4), np.float32), "side": np.ones(3, np.float32)}
    calibration = load_calibration(large, [X, SIDE], samples=4000, batch=100, held_out=0)
    part = calibration.slice(0, 1)
    assert len(pickle.dumps(part)) < len(pickle.dumps(calibration)) / 5
    assert len(pickle.dumps(part.without_data())) < len(pickle.dumps(part))
    assert part.without_data().batch_text(0) == calibration.batch_text(0)


def test_of_files_nothing_has_to_be_taken_out(tmp_path: Path) -> None:
    part = loaded(as_npz(tmp_path)).slice(0, 2)
    assert part.without_data() is part


def test_pictures_pass_from_process_to_process(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    calibration = load_calibration(tmp_path, [IMAGE], samples=4, batch=1, held_out=0)
    same_batches(list(sent(calibration.slice(1, 3)).batches()), list(calibration.batches())[1:3])


@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 2), (1, 6)])
def test_parts_that_there_are_not_are_refused(index: int, count: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"part {index} of {count}: .* there are 5 of these"):
        loaded(as_npz(tmp_path)).shard(index, count)
