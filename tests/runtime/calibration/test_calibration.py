"""Calibration data: every source gives the same batches, batches hold the source, and each refusal says what to do."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from snpc.errors import UserError
from snpc.runtime.calibration import PREPROCESS, Calibration, ImageOptions, load_calibration
from snpc.runtime.io import SpillFiles
from snpc.types import TensorSpec

IDS = TensorSpec("ids", np.dtype(np.int64), ("batch", "seq"))
MASK = TensorSpec("attention_mask", np.dtype(np.int64), ("batch", "seq"))
X = TensorSpec("x", np.dtype(np.float32), ("batch", 4))
IMAGE = TensorSpec("image", np.dtype(np.float32), ("batch", 3, 8, 8))
TEXT = (IDS, MASK)


def spec(name: str, dtype: Any, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def text_arrays(samples: int = 10, length: int = 6) -> dict[str, np.ndarray]:
    ids = np.arange(samples * length, dtype=np.int64).reshape(samples, length)
    return {"ids": ids, "attention_mask": np.ones_like(ids)}


def numbers(samples: int = 10) -> np.ndarray:
    return np.arange(samples * 4, dtype=np.float32).reshape(samples, 4)


def joined(calibration: Calibration) -> dict[str, np.ndarray]:
    feeds = list(calibration.batches())
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def sizes(calibration: Calibration, name: str = "x") -> list[int]:
    return [len(feed[name]) for feed in calibration.batches()]


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def save_png(path: Path, height: int = 8, width: int = 8, mode: str = "RGB", value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).convert(mode).save(path)
    return path


# every source gives the same samples


def as_npz(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    return save_npz(folder / "calib.npz", labels=np.array(["a"]), **arrays)


def as_npz_folder(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """Lone samples and batches, mixed; more than ten, so that the order of names matters."""
    bounds = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        cut = {name: array[start] if end == start + 1 else array[start:end] for name, array in arrays.items()}
        save_npz(folder / f"part{index}.npz", **cut)
    (folder / "README.txt").write_text("ignored")
    (folder / "._part0.npz").write_bytes(b"hidden files are ignored")
    return folder


def as_json(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """Polygraphy's wrapper, its type marker, once more around a lazy array; plain numbers; lone samples."""
    ids, mask = arrays["ids"], arrays["attention_mask"]
    feeds = [
        {"ids": {"array": npy64(ids[:2]), "polygraphy_class": "ndarray"}, "attention_mask": {"array": npy64(mask[:2])}},
        {"ids": {"values": {"array": npy64(ids[2:3])}, "polygraphy_class": "LazyArray"}, "attention_mask": [[1] * 6]},
        {"ids": ids[3].tolist(), "attention_mask": mask[3].tolist(), "labels": "ignored"},
        {"ids": ids[4:].tolist(), "attention_mask": mask[4:].tolist()},
    ]
    (folder / "inputs.json").write_text(json.dumps(feeds))
    return folder / "inputs.json"


def as_test_data(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """Tensors without names go by position; eleven sets, so that the order of numbers matters."""
    for index in range(11):
        rows = slice(index, index + 1) if index < 10 else slice(10, None)
        data_set = folder / f"test_data_set_{index}"
        data_set.mkdir()
        for place, name in enumerate(("ids", "attention_mask")):
            tensor = numpy_helper.from_array(arrays[name][rows])
            (data_set / f"input_{place}.pb").write_bytes(tensor.SerializeToString())
        (data_set / "output_0.pb").write_bytes(b"ignored")
    return folder


def as_script(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    save_npz(folder / "data.npz", **arrays)
    (folder / "helper.py").write_text(
        "def rows(data):\n"
        "    for row in range(len(data['ids'])):\n"
        "        yield {name: data[name][row:row + 1] for name in data.files}\n"
    )
    (folder / "load.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def load_data():\n"
        "    from helper import rows\n"
        "    yield from rows(np.load(Path(__file__).with_name('data.npz')))\n"
    )
    return f"{folder / 'load.py'}:load_data"


class Reader:
    """onnxruntime's CalibrationDataReader, by shape only."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.row = 5  # as if it had been used before

    def rewind(self) -> None:
        self.row = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self.row == len(self.arrays["ids"]):
            return None
        self.row += 1
        return {name: array[self.row - 1 : self.row] for name, array in self.arrays.items()}


def as_list(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    return [{name: array[row : row + 2] for name, array in arrays.items()} for row in range(0, 14, 2)]


def as_generator(folder: Path, arrays: dict[str, np.ndarray]) -> Any:
    """Always the same buffer: what was handed out must have been copied."""

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        buffer = {name: np.empty_like(array[:1]) for name, array in arrays.items()}
        for row in range(14):
            for name, array in arrays.items():
                buffer[name][:] = array[row]
            yield buffer

    return feeds()


SOURCES: list[Callable[[Path, dict[str, np.ndarray]], Any]] = [
    as_npz,
    as_npz_folder,
    as_json,
    as_test_data,
    as_script,
    as_list,
    as_generator,
    lambda folder, arrays: arrays,
    lambda folder, arrays: lambda: as_list(folder, arrays),
    lambda folder, arrays: lambda: arrays,
    lambda folder, arrays: Reader(arrays),
    lambda folder, arrays: lambda: Reader(arrays),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_its_samples_in_order(source: Any, tmp_path: Path) -> None:
    arrays = text_arrays(14)
    calibration = load_calibration(source(tmp_path, arrays), TEXT, samples=14, batch=4)
    assert calibration.samples == 14
    for _ in range(2):  # re-iterable
        feeds = list(calibration.batches())
        assert [len(feed["ids"]) for feed in feeds] == [4, 4, 4, 2]
        for name, array in arrays.items():
            values = np.concatenate([feed[name] for feed in feeds])
            assert values.dtype == array.dtype
            np.testing.assert_array_equal(values, array)


def test_onnxruntimes_own_reader_class() -> None:
    from onnxruntime.quantization import CalibrationDataReader

    class Own(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"x": numbers(2)}, {"x": numbers(1)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    assert load_calibration(Own(), [X]).samples == 3


def test_npy_for_a_model_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers())
    np.testing.assert_array_equal(joined(load_calibration(tmp_path / "a.npy", [X]))["x"], numbers())
    np.save(tmp_path / "b.npy", numbers()[0])
    assert sizes(load_calibration(tmp_path, [X])) == [8, 3]


def test_npz_without_names_for_a_model_with_one_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", numbers())
    np.testing.assert_array_equal(joined(load_calibration(tmp_path / "a.npz", [X]))["x"], numbers())


def test_one_test_data_set_with_named_tensors_in_any_order(tmp_path: Path) -> None:
    arrays = text_arrays(3)
    for place, name in enumerate(("attention_mask", "ids")):
        (tmp_path / f"input_{place}.pb").write_bytes(numpy_helper.from_array(arrays[name], name).SerializeToString())
    np.testing.assert_array_equal(joined(load_calibration(tmp_path, TEXT))["ids"], arrays["ids"])


def test_a_path_object_may_name_a_function(tmp_path: Path) -> None:
    assert load_calibration(Path(as_script(tmp_path, text_arrays())), TEXT).samples == 10


def test_the_script_leaves_the_import_path_as_it_was(tmp_path: Path) -> None:
    before = list(sys.path)
    load_calibration(as_script(tmp_path, text_arrays()), TEXT)
    assert sys.path == before


def test_feeds_run_in_onnxruntime(tmp_path: Path) -> None:
    import onnxruntime

    graph = helper.make_graph(
        [helper.make_node("Mul", ["ids", "attention_mask"], ["y"])],
        "mul",
        [helper.make_tensor_value_info(one.name, TensorProto.INT64, one.shape) for one in TEXT],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ("batch", "seq"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = {name: array.astype(np.int32) for name, array in text_arrays().items()}
    outputs = [session.run(None, feed)[0] for feed in load_calibration(arrays, TEXT, batch=4).batches()]
    np.testing.assert_array_equal(np.concatenate(outputs), arrays["ids"])


# batches hold the source


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2)), min_size=1, max_size=8),
    samples=st.integers(1, 30),
    batch=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_batches_concatenate_back_to_the_chosen_samples(
    parts: list[tuple[int, int]], samples: int, batch: int, seed: int, tmp_path: Path
) -> None:
    """Parts of any size, of two sequence lengths: nothing is lost, doubled or reordered, and no batch is too big."""
    total = sum(count for count, _ in parts)
    rows = iter(range(total))
    feeds = [{"ids": np.array([[next(rows)] * length for _ in range(count)])} for count, length in parts]
    (tmp_path / "a.json").write_text(json.dumps([{"ids": feed["ids"].tolist()} for feed in feeds]))
    calibration = load_calibration(tmp_path / "a.json", [IDS], samples=samples, batch=batch, seed=seed, held_out=0)
    given_rows = [int(row[0]) for feed in calibration.batches() for row in feed["ids"]]
    assert len(given_rows) == calibration.samples == min(samples, total)
    assert given_rows == sorted(set(given_rows))
    assert all(1 <= len(feed["ids"]) <= batch for feed in calibration.batches())
    again = [int(row[0]) for feed in calibration.batches() for row in feed["ids"]]
    assert again == given_rows
    from_list = load_calibration(feeds, [IDS], samples=samples, batch=batch, held_out=0)
    first = [int(row[0]) for feed in from_list.batches() for row in feed["ids"]]
    assert first == list(range(min(samples, total)))


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 40), size=st.integers(1, 9), samples=st.integers(1, 50))
def test_a_static_batch_is_always_full(total: int, size: int, samples: int) -> None:
    model = [spec("x", np.float32, size, 4)]
    usable = min(total, samples) // size * size
    if not usable:
        with pytest.raises(UserError, match=f"the model's batch is {size}, but"):
            load_calibration({"x": numbers(total)}, model, samples=samples, held_out=0)
        return
    calibration = load_calibration({"x": numbers(total)}, model, samples=samples, batch=3, held_out=0)
    assert set(sizes(calibration)) == {size}
    assert calibration.batch == size
    assert calibration.samples == sum(sizes(calibration)) == usable
    assert ("dropped" in calibration.describe()) == (usable < min(total, samples))


def test_static_batches_are_filled_across_files(tmp_path: Path) -> None:
    for index, row in enumerate(numbers(7)):
        save_npz(tmp_path / f"{index}.npz", x=row)
    calibration = load_calibration(tmp_path, [spec("x", np.float32, 3, 4)])
    np.testing.assert_array_equal(joined(calibration)["x"], numbers(6))


def test_the_seed_chooses_the_samples_of_a_file(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=numbers(200))
    chosen = [tuple(joined(load_calibration(path, [X], samples=20, seed=seed))["x"][:, 0]) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert list(chosen[0]) == sorted(set(chosen[0]))
    assert max(chosen[0]) > 4 * 20  # not just the beginning


def test_an_endless_generator_is_read_as_far_as_needed() -> None:
    pulled = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            pulled.append(1)
            yield {"x": numbers(3)}

    calibration = load_calibration(endless, [X], samples=7, batch=2)
    assert sizes(calibration) == [2, 2, 2, 1]
    assert sizes(calibration) == [2, 2, 2, 1]
    assert len(pulled) == 12  # 7 samples to fit to, and 28 that are held out
    assert calibration.held_out is not None and calibration.held_out.samples == 28
    assert load_calibration(endless, [X], samples=7, held_out=0).held_out is None
    assert len(pulled) == 15


def test_different_lengths_never_share_a_batch() -> None:
    feeds = [{"ids": [[1] * length]} for length in (3, 3, 5, 5, 5, 3)]
    shapes = [feed["ids"].shape for feed in load_calibration(feeds, [IDS]).batches()]
    assert shapes == [(2, 3), (3, 5), (1, 3)]


def test_changing_a_fed_array_does_not_change_the_next_pass() -> None:
    calibration = load_calibration({"x": numbers(), "t": np.ones((2, 3), np.float32)}, [X, spec("t", np.float32, 2, 3)])
    for feed in calibration.batches():
        for array in feed.values():
            array[:] = -1
    np.testing.assert_array_equal(joined(calibration)["x"], numbers())
    assert (next(calibration.batches())["t"] == 1).all()


def test_only_the_chosen_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(30):
        save_png(tmp_path / f"{index}.png", value=index)
    opened: list[Any] = []
    own = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: opened.append(file) or own(file, **options))
    calibration = load_calibration(tmp_path, [IMAGE], samples=9, batch=2, held_out=0)
    assert len(opened) == 2  # the first batch, to fail early
    feeds = calibration.batches()
    next(feeds)
    assert len(opened) == 4  # a batch is read when it is asked for
    assert len(list(feeds)) == 4
    assert len(opened) == 11


# inputs without a sample axis


@pytest.mark.parametrize(
    ("x", "table"),
    [
        (X, spec("positions", np.int64, 1, 6)),
        (X, spec("positions", np.int64, 10, 6)),
        (spec("x", np.float32, 2, 4), spec("positions", np.int64, 3, 6)),
        (X, spec("flag", np.bool_, 1)),
        (X, spec("scale", np.float32)),
    ],
)
def test_an_input_without_a_sample_axis_is_fed_whole(x: TensorSpec, table: TensorSpec, tmp_path: Path) -> None:
    value = np.ones(table.shape, table.dtype)
    path = save_npz(tmp_path / "a.npz", x=numbers(), **{table.name: value})
    feeds = list(load_calibration(path, [x, table], batch=5).batches())
    assert [len(feed["x"]) for feed in feeds] == ([2] * 5 if x is not X else [5, 5])
    for feed in feeds:
        assert feed[table.name].dtype == table.dtype
        np.testing.assert_array_equal(feed[table.name], value)


def test_samples_with_different_whole_inputs_never_share_a_batch(tmp_path: Path) -> None:
    for index, flag in enumerate([True, True, False, False, False]):
        save_npz(tmp_path / f"{index}.npz", x=numbers(1), flag=np.array([flag]))
    feeds = list(load_calibration(tmp_path, [X, spec("flag", np.bool_, 1)]).batches())
    assert [(len(feed["x"]), bool(feed["flag"][0])) for feed in feeds] == [(2, True), (3, False)]


def test_an_empty_cache_is_fed_as_it_is(tmp_path: Path) -> None:
    past = spec("past", np.float32, "batch", 2, "past", 4)
    path = save_npz(tmp_path / "a.npz", x=numbers(5), past=np.zeros((5, 2, 0, 4), np.float32))
    assert next(load_calibration(path, [X, past]).batches())["past"].shape == (5, 2, 0, 4)


# described


@pytest.mark.parametrize(
    ("source", "model", "samples", "words"),
    [
        ("npz", X, 4, "4 of 10 samples from {path}, 4 per batch"),
        ("npz", X, 10, "all 10 samples from {path}, 8 per batch"),
        ("npz", X, 99, "all 10 samples from {path} (99 asked), 8 per batch"),
        ("npz", X, 3, "3 of 10 samples from {path}, 3 per batch"),
        ("npz", spec("x", np.float32, 4, 4), 99, "8 of 10 samples from {path}, 4 per batch, 2 dropped: "),
        ("list", X, 4, "the first 4 samples from list, 4 per batch"),
        ("list", X, 99, "all 10 samples from list (99 asked), 8 per batch"),
    ],
)
def test_described(source: str, model: TensorSpec, samples: int, words: str, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=numbers())
    data = path if source == "npz" else [{"x": row} for row in numbers()]
    assert words.format(path=path) in load_calibration(data, [model], samples=samples).describe()


# types


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (np.int32, np.int64), (np.int64, np.int32), (np.uint8, np.int64), (np.bool_, np.int64), (np.int64, np.bool_),
        (np.int64, np.float32), (np.bool_, np.float32), (np.float64, np.float32), (np.float64, np.float16),
        (np.float32, np.float64), (np.float32, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float32),
        (">f4", np.float32),
    ],
)  # fmt: skip
def test_the_models_type_is_made(stored: Any, dtype: Any) -> None:
    data = np.array([[0, 1, 1, 0]]).astype(stored)
    (feed,) = load_calibration({"x": data}, [spec("x", dtype, "n", 4)]).batches()
    assert feed["x"].dtype == np.dtype(dtype)
    assert feed["x"].astype(int).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("stored", "dtype", "words"),
    [
        (np.array([[0], [2**31]]), np.int32, "int32, which cannot hold 2147483648 in sample 1"),
        (np.array([[0], [-1]]), np.uint64, "uint64, which cannot hold -1 in sample 1"),
        (np.array([[0], [2]]), np.bool_, "bool, which cannot hold 2 in sample 1"),
        (np.array([[2**24 + 1]]), np.float32, "float32, which cannot hold 16777217"),
        (np.array([[1e6]]), np.float16, "float16, which cannot hold 1000000.0 in sample 0"),
        (np.array([[0.5]]), np.int64, "takes int64, the data is float64: rounding would change it; save it as int64"),
        (np.array([[1.0]]), np.bool_, "takes bool, the data is float64: rounding"),
        (np.array([["a"]]), np.int64, "the data is <U1: only booleans, integers and floats"),
        (np.array([[1j]]), np.float32, "the data is complex128: only booleans"),
        (np.array([[1]]), np.object_, "takes object, the data is int64: only booleans"),
    ],
)
def test_values_the_type_cannot_hold_are_refused(stored: np.ndarray, dtype: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration({"x": stored}, [spec("x", dtype, "n", 1)])


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    dtype=st.sampled_from([np.int32, np.uint8, np.int64]),
)
def test_integers_come_through_unchanged_or_not_at_all(values: list[int], dtype: Any) -> None:
    fits = all(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max for value in values)
    try:
        fed = joined(load_calibration({"x": values}, [spec("x", dtype, "n")], samples=len(values), held_out=0))["x"]
    except UserError:
        assert not fits
    else:
        assert fits and fed.tolist() == values


# pictures


def test_pictures_are_normalised_with_imagenets_numbers_unless_told(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", value=255)
    (feed,) = load_calibration(tmp_path, [IMAGE]).batches()
    assert feed["image"].dtype == np.float32 and feed["image"].shape == (1, 3, 8, 8)
    mean, std = PREPROCESS["imagenet"]
    np.testing.assert_allclose(feed["image"][0, :, 0, 0], (1 - np.array(mean)) / np.array(std), rtol=1e-6)
    (feed,) = load_calibration(tmp_path, [IMAGE], images=ImageOptions(mean=(0.5,), std=(0.5,))).batches()
    assert (feed["image"] == 1).all()


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "bmp", "webp"])
def test_picture_formats(suffix: str, tmp_path: Path) -> None:
    save_png(tmp_path / f"a.{suffix}")
    (tmp_path / "labels.csv").write_text("ignored")
    assert load_calibration(tmp_path, [IMAGE]).samples == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_picture_modes(mode: str, tmp_path: Path) -> None:
    save_png(tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}", mode=mode, value=255)
    (feed,) = load_calibration(tmp_path, [spec("x", np.uint8, 1, 3, 8, 8)]).batches()
    assert (feed["x"] == 255).all()


def test_a_raw_input_gets_raw_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = ImageOptions(layout="nhwc")
    (feed,) = load_calibration(tmp_path, [spec("x", np.uint8, "n", 8, 8, 3)], images=options).batches()
    np.testing.assert_array_equal(feed["x"][0], pixels)
    (feed,) = load_calibration(tmp_path, [spec("x", np.uint8, "n", 3, 8, 8)]).batches()
    np.testing.assert_array_equal(feed["x"][0], pixels.transpose(2, 0, 1))


def test_how_pictures_are_prepared_is_recorded(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png")
    options = ImageOptions(mean=(0.5,), std=(0.25, 0.5, 1.0))
    calibration = load_calibration(tmp_path, [IMAGE], images=options)
    assert calibration.describe().endswith("pictures 8x8, mean 0.5, std 0.25,0.5,1, nchw")
    images = calibration.record()["images"]
    assert (images["mean"], images["std"], images["layout"]) == ((0.5,), (0.25, 0.5, 1.0), "nchw")
    (raw,) = [load_calibration(tmp_path, [spec("x", np.uint8, "n", 3, 8, 8)]).images]
    assert raw is not None and raw.describe() == "8x8, raw pixels, nchw"


def test_the_digest_is_that_of_the_samples(tmp_path: Path) -> None:
    data = {"x": np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)}
    inputs = [spec("x", np.float32, "n", 4)]
    file = save_npz(tmp_path / "a.npz", **data)

    def digest(source: Any = file, **options: Any) -> str:
        return load_calibration(source, inputs, **{"samples": 6, **options}).digest

    assert digest() == digest(batch=2) == digest(save_npz(tmp_path / "copy.npz", **data))
    changed = {"x": data["x"] + np.float32(1e-6)}
    others = {digest(seed=1), digest(samples=5), digest(save_npz(tmp_path / "b.npz", **changed))}
    assert len({digest(), *others}) == 4


def test_one_channel_is_greyscale(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", value=51)
    options = ImageOptions(mean=(0.0,), std=(1.0,))
    (feed,) = load_calibration(tmp_path, [spec("x", np.float32, "n", 1, 8, 8)], images=options).batches()
    np.testing.assert_allclose(feed["x"], np.full((1, 1, 8, 8), 0.2), rtol=1e-6)


def test_the_short_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    """Thirds of red, green, blue side by side: a square crop of the middle is green; so too when stacked."""
    wide = np.zeros((40, 120, 3), np.uint8)
    for place in range(3):
        wide[:, 40 * place : 40 * (place + 1), place] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.png")
    (feed,) = load_calibration(tmp_path, [spec("x", np.uint8, "n", 3, 8, 8)]).batches()
    middle = feed["x"][:, :, 2:6, 2:6]
    assert (middle[:, 1] > 250).all() and (middle[:, [0, 2]] < 5).all()


@pytest.mark.parametrize(("height", "width"), [(7, 301), (301, 7), (3, 3), (640, 480), (9, 8)])
def test_any_picture_size_fits(height: int, width: int, tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", height, width)
    options = ImageOptions(size=(10, 6))
    (feed,) = load_calibration(tmp_path, [spec("x", np.uint8, "n", "c", "h", "w")], images=options).batches()
    assert feed["x"].shape == (1, 3, 10, 6) and (feed["x"] == 128).all()


def test_a_model_for_a_single_picture_gets_one_at_a_time(tmp_path: Path) -> None:
    for index in range(3):
        save_png(tmp_path / f"{index}.png", value=index)
    single = spec("x", np.uint8, 3, 8, 8)
    calibration = load_calibration(tmp_path, [single])
    feeds = list(calibration.batches())
    assert (calibration.samples, calibration.batch, calibration.inputs) == (3, 1, (single,))
    assert [(feed["x"].shape, int(feed["x"][0, 0, 0])) for feed in feeds] == [((3, 8, 8), value) for value in range(3)]


def test_pictures_in_class_folders_come_from_all_of_them(tmp_path: Path) -> None:
    for label in range(4):
        for index in range(50):
            save_png(tmp_path / f"class{label}" / f"{index}.png", value=10 * label)
    values = joined(load_calibration(tmp_path, [spec("x", np.uint8, "n", 3, 8, 8)], samples=40))["x"][:, 0, 0, 0]
    assert set(values.tolist()) == {0, 10, 20, 30}


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([IMAGE, X], {}, "pictures can feed a model with one input, this one has 2 (image, x)"),
        ([X], {}, "it holds pictures, but input 'x' (float32 ['batch', 4]) takes none"),
        ([spec("x", np.int64, "n", 3, 8, 8)], {}, "it holds pictures, but input 'x' (int64"),
        ([spec("x", np.uint16, "n", 3, 8, 8)], {}, "takes uint16: pictures are fed as uint8 or floats"),
        ([spec("x", np.float32, "n", 8, 8, 3)], {}, "as nchw not a picture of 1 or 3 channels: it looks like nhwc"),
        ([IMAGE], {"layout": "nhwc"}, "it looks like nchw (--image-layout)"),
        ([spec("x", np.float32, "n", 5, 8, 8)], {}, "not a picture of 1 or 3 channels: save what it takes as an .npz"),
        ([spec("x", np.float32, "n", 80, 300)], {}, "not a picture of 1 or 3 channels"),
        ([spec("x", np.float32, "n", 3, "h", "w")], {}, "any size ['n', 3, 'h', 'w']: choose one (--image-size)"),
        ([IMAGE], {"size": (8, 9)}, "image size 8x9, but input 'image' takes 8x8: leave --image-size out"),
        ([IMAGE], {"mean": (0.5, 0.5)}, "image mean has 2 values, but input 'image' takes 3 channel(s)"),
        ([spec("x", np.float32, "n", 1, 8, 8)], {}, "takes 1 channel(s): give one value or 1 (--image-mean)"),
    ],
)
def test_models_that_take_no_such_pictures_are_refused(
    inputs: list[TensorSpec], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_png(tmp_path / "a.png")
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration(tmp_path, inputs, images=ImageOptions(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "chw"}, "image layout 'chw': nchw or nhwc"),
        ({"size": (0, 8)}, "image size (0, 8): height and width are at least 1"),
        ({"std": (0.0,)}, "one positive number"),
        ({"std": ()}, "one positive number"),
        ({"mean": (float("nan"),)}, "image mean (nan,)"),
    ],
)
def test_image_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        ImageOptions(**options)


def test_broken_pictures_are_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"no picture", b""):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.png: .*: the picture cannot be read; repair or remove it"):
            load_calibration(tmp_path, [IMAGE])
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="pixels have more than 8 bits"):
        load_calibration(tmp_path, [IMAGE])


def test_a_picture_of_one_row_takes_little_memory(tmp_path: Path) -> None:
    """Resized whole until it covers 8 x 8 it would have 240,000 columns; a frame of 224 takes gigabytes."""
    Image.new("RGB", (30000, 1), (10, 20, 30)).save(tmp_path / "a.png")
    wide = spec("x", np.float32, "n", 3, 224, 224)
    tracemalloc.start()
    (feed,) = load_calibration(tmp_path, [wide], images=ImageOptions(mean=(0.0,), std=(1.0,))).batches()
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 1 << 26
    np.testing.assert_allclose(feed["x"][0, :, 100, 100] * 255, [10, 20, 30], atol=1e-3)


def test_the_middle_of_a_long_picture_is_what_counts(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4000, 3), np.uint8)
    pixels[:, 1990:2010] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "b.png")
    for feed in load_calibration(
        tmp_path, [spec("x", np.uint8, "n", 8, 8, 3)], images=ImageOptions(layout="nhwc")
    ).batches():
        assert (feed["x"] == 200).all()


def test_pictures_stand_as_their_orientation_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    picture.save(tmp_path / "a.png", exif=exif)
    (feed,) = load_calibration(
        tmp_path, [spec("x", np.uint8, "n", 8, 8, 3)], images=ImageOptions(layout="nhwc")
    ).batches()
    np.testing.assert_array_equal(feed["x"][0], np.rot90(pixels, -1))


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "PPM", "ICO"])
def test_only_common_formats_are_decoded_whatever_the_name(kind: str, tmp_path: Path) -> None:
    """Pillow starts Ghostscript for PostScript."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(UserError, match=r"a\.png: UnidentifiedImageError.*cannot be read; repair or remove it"):
        load_calibration(tmp_path, [IMAGE])


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", 60, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # an error from twice as many on, a warning below
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_calibration(tmp_path, [IMAGE])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="DecompressionBombError"):
        load_calibration(tmp_path, [IMAGE])


# bombs


def test_headers_that_claim_more_than_there_is(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 4)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(64))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(64))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UserError, match=r"its header claims 16000000000000 bytes, \d+ are there"):
            load_calibration(tmp_path / name, [X])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_of_an_archive_only_the_chosen_samples_are_in_memory(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, x=np.zeros((100_000, 1000), np.float32))  # 400 MB
    tracemalloc.start()
    try:
        for feeds in load_calibration(path, [spec("x", np.float32, "batch", 1000)], samples=64).batches():
            assert not feeds["x"].any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_samples_of_code_lie_in_files_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snpc.runtime.calibration.sources.MAX_HELD_BYTES", 100)
    kept, keep = [], SpillFiles.keep
    monkeypatch.setattr(SpillFiles, "keep", lambda self, array: kept.append(array) or keep(self, array))
    calibration = load_calibration(({"x": row[None]} for row in numbers(20)), [X], samples=20, batch=4, held_out=0)
    np.testing.assert_array_equal(joined(calibration)["x"], numbers(20))
    np.testing.assert_array_equal(joined(calibration)["x"], numbers(20))
    assert len(kept) == 20 - 100 // 16


def test_samples_without_entries_are_not_numbered_for_ever(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12, 0)})
    (tmp_path / "a.npy").write_bytes(header.getvalue())
    with pytest.raises(UserError, match="'ids' claims 1000000000000 samples"):
        load_calibration(tmp_path / "a.npy", [IDS])


def test_batches_without_samples_end(tmp_path: Path) -> None:
    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {"x": np.zeros((0, 4), np.float32)}

    with pytest.raises(UserError, match="1001th batch in a row without a sample"):
        load_calibration(endless, [X])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.json", "set/input_0.pb"])
def test_a_pipe_is_no_source(name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"not a regular file|nothing to calibrate on"):
        load_calibration(tmp_path / name if name[0] == "a" else tmp_path / "set", [X])


def test_folders_that_may_not_be_entered_are_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "in" / "a.png")
    listed = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    assert load_calibration(tmp_path, [IMAGE]).samples == 1


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"needs Pillow: pip install snpc\[images\]"):
        load_calibration(tmp_path, [IMAGE])


# refusals: arrays


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"attention_mask": np.ones((2, 4)), "y": 1}, "no data for input ids; it holds attention_mask, y: name"),
        ({}, "no data for input ids, attention_mask; it holds nothing"),
        (text_arrays() | {"ids": np.ones((10, 6, 1), int)}, "'ids' has 2 axes [batch,seq], the data 3 [10,6,1]"),
        (text_arrays() | {"ids": np.ones(10, int)}, "'ids' has 2 axes [batch,seq], the data 1 [10]"),
        (text_arrays() | {"ids": np.ones((9, 6), int)}, "9 samples of 'ids' but 10 of 'attention_mask'"),
        (text_arrays(0), "it holds no samples"),
        (text_arrays() | {"attention_mask": np.eye(10, 6, dtype=int)}, "attention_mask of sample 6 is all zeros"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", **arrays)
    for source in (path, arrays):
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            load_calibration(source, TEXT, batch=16)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_calibration(path, TEXT, batch=16)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (spec("x", np.float32, "n", 5), "input 'x' takes [n,5], the data is [10,4]: resize, pad or cut it"),
        (spec("x", np.float32, "", 5), "input 'x' takes [?,5], the data is [10,4]"),
    ],
)
def test_wrong_static_sizes_are_refused(x: TensorSpec, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration({"x": numbers()}, [x])


def test_a_whole_input_must_have_exactly_its_shape() -> None:
    table = spec("table", np.float32, 3, 4)
    with pytest.raises(UserError, match=r"takes \[3,4\] \(fed whole with every batch: .*\), the data is \[10,4\]"):
        load_calibration({"x": numbers(), "table": numbers()}, [X, table])


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_bad_numbers_are_refused_when_their_batch_comes(value: float, word: str, tmp_path: Path) -> None:
    data = numbers()
    data[6, 2] = value
    path = save_npz(tmp_path / "a.npz", x=data)
    words = f"a.npz: input 'x' holds {word} in sample 6"
    with pytest.raises(UserError, match=words):
        load_calibration(path, [X], batch=8)
    feeds = load_calibration(path, [X], batch=4).batches()
    next(feeds)
    with pytest.raises(UserError, match=words):
        next(feeds)


def test_bad_numbers_in_a_whole_input_are_refused() -> None:
    with pytest.raises(UserError, match="input 's' holds NaN in every sample"):
        load_calibration({"x": numbers(), "s": np.nan}, [X, spec("s", np.float32)])


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", np.zeros((3, 1, 4, 4), np.float32)),  # additive: nothing is hidden
        ("attention_mask", np.full((3, 1, 4, 4), -np.inf, np.float32)),
        ("global_attention_mask", np.zeros((3, 4), np.int64)),
        ("bool_masked_pos", np.zeros((3, 4), np.bool_)),
    ],
)
def test_masks_that_may_be_zero_or_minus_infinity(name: str, mask: np.ndarray) -> None:
    assert load_calibration({name: mask}, [TensorSpec(name, mask.dtype, ("n", *mask.shape[1:]))]).samples == 3


@pytest.mark.parametrize(("dtype", "shape"), [(np.int64, (3, 4)), (np.bool_, (3, 1, 4, 4)), (np.float32, (3, 4))])
def test_masks_that_hide_everything(dtype: Any, shape: tuple[int, ...]) -> None:
    mask = np.ones(shape, dtype)
    mask[1] = 0
    with pytest.raises(UserError, match="encoder_attention_mask of sample 1 is all zeros, which hides every token"):
        load_calibration(
            {"encoder_attention_mask": mask}, [TensorSpec("encoder_attention_mask", mask.dtype, ("n", *shape[1:]))]
        )


# refusals: requests


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([X], {"samples": 0}, "0 calibration samples asked"),
        ([X], {"batch": 0}, "calibration batch 0"),
        ([], {}, "the model has no inputs"),
        ([spec("s", np.float32)], {}, "the model takes only scalars (s)"),
        ([spec("x", np.float32, 0, 4)], {}, "the model's batch size is 0"),
        (
            [spec("x", np.float32, 12, 4)],
            {},
            "the model's batch is 12, but there are only 10 samples: give at least 12",
        ),
        (
            [spec("x", np.float32, 6, 4)],
            {"samples": 5},
            "only 5 of 10 samples are asked for: --calib-samples 6 or more",
        ),
    ],
)
def test_requests_that_cannot_be_served(inputs: list[TensorSpec], options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration({"x": numbers(), "s": 1.0}, inputs, **options)


def test_a_static_batch_of_different_lengths_is_refused() -> None:
    feeds = [{"ids": [[1] * (index + 1)]} for index in range(6)]
    with pytest.raises(UserError, match="no 2 neighboring samples have the same sizes"):
        load_calibration(feeds, [spec("ids", np.int64, 2, "seq")])


@pytest.mark.parametrize("source", [5, None, object()])
def test_things_that_are_no_source(source: Any) -> None:
    with pytest.raises(UserError, match=r"calibration data of type .*: give a path, dicts of arrays"):
        load_calibration(source, [X])


# refusals: files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.npz", "absent.npz does not exist: calibration data is an .npz"),
        ("data.bin", "unknown kind of file '.bin': calibration data is an .npz"),
        ("load.py", "load.py:load_data (it will be run)"),
        ("empty", "nothing to calibrate on in this folder (notes.txt)"),
        ("both", "it holds both arrays (a.npz) and pictures (a.png)"),
        ("absent.py:load", "absent.py does not exist"),
    ],
)
def test_paths_that_hold_no_data(name: str, words: str, tmp_path: Path) -> None:
    for folder in ("empty", "both"):
        (tmp_path / folder).mkdir()
    for file in ("data.bin", "load.py", "empty/notes.txt", "both/a.npz", "both/a.png"):
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration(str(tmp_path / name), [X])


def test_one_array_for_several_inputs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers())
    for path in (tmp_path, tmp_path / "a.npy"):
        with pytest.raises(UserError, match=r"a\.npy: one array, but the model has 2 inputs \(x, attention_mask\)"):
            load_calibration(path, (X, MASK))


class Bomb:
    """Would leave a trace if it were ever unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("kind", ["npz", "npy", "json", "folder"])
def test_pickles_are_never_loaded(kind: str, tmp_path: Path) -> None:
    data = np.array([Bomb()], dtype=object)
    path = tmp_path / ("a.npy" if kind == "folder" else f"a.{kind}")
    if kind == "npz":
        np.savez(path, x=data)
    elif kind == "json":
        path.write_text(json.dumps([{"x": {"array": npy64(data)}}]))
    else:
        np.save(path, data)
    with pytest.raises(UserError, match=r"(?i)object.*allow_pickle=False|Python objects are pickles"):
        load_calibration(tmp_path if kind == "folder" else path, [X])


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
@pytest.mark.parametrize("damage", ["no numpy file", "cut short", "empty"])
def test_broken_array_files_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    np.savez(path, x=numbers()) if name == "a.npz" else np.save(path, numbers())
    content = {"no numpy file": b"hello, world", "cut short": path.read_bytes()[:-40], "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*: it is broken or not what its name says; write it again"):
        load_calibration(path, [X])


def test_a_damaged_member_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=numbers(1000))
    content = bytearray(path.read_bytes())
    content[4000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: BadZipFile: Bad CRC-32.*: it is broken"):
        load_calibration(path, [X])


def test_a_file_that_changes_in_use_is_refused(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", x=numbers())
    calibration = load_calibration(path, [X])
    save_npz(path, x=numbers(3))
    with pytest.raises(UserError, match="input 'x' changed while it was in use: run again"):
        list(calibration.batches())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "JSONDecodeError: "),
        ("[]", "it holds no samples"),
        ('[{"x": []}]', "'x' has 2 axes [batch,4], the data 1 [0]"),
        ("[[1, 2]]", "dict 0: it is a list: it should hold a list of dicts"),
        ('{"lst": []}', "dict 0: no data for input x; it holds lst"),
        ('[{"x": [[1, 2, 3, 4]]}, {"y": 1}]', "dict 1: no data for input x; it holds y"),
        ('[{"x": {"array": "!!"}}]', "input 'x' should be numbers, or an .npy file in base64 under \"array\""),
        ('[{"x": {"array": "aGVsbG8="}}]', "input 'x' should be numbers"),
        ('[{"x": {"data": [1]}}]', "a dict with data is no array"),
        ('[{"x": [[1, 2], [3]]}]', "input 'x' should be numbers"),
        ('[{"x": [["a", "b", "c", "d"]]}]', "the data is <U1: only booleans"),
        ('[{"x": [[1, NaN, 3, 4]]}]', "input 'x' holds NaN in sample 0"),
    ],
)
def test_broken_json_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        load_calibration(tmp_path / "a.json", [X])


def test_broken_test_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "input_0.pb"
    for content in (b"\xff\xff\xff", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"input_0\.pb: .*: it is no ONNX tensor; write it with"):
            load_calibration(tmp_path, [X])
    tensor = onnx.TensorProto(data_type=1, dims=[1, 4], data_location=onnx.TensorProto.EXTERNAL)
    file.write_bytes(tensor.SerializeToString())
    with pytest.raises(UserError, match="its data lies in another file"):
        load_calibration(tmp_path, [X])
    good = numpy_helper.from_array(numbers()).SerializeToString()
    file.write_bytes(good)
    (tmp_path / "input_1.pb").write_bytes(good)
    with pytest.raises(UserError, match=r"input_1\.pb: the model has 1 inputs \(x\), so there is none for it"):
        load_calibration(tmp_path, [X])
    (tmp_path / "input_1.pb").unlink()
    with pytest.raises(UserError, match="no data for input y; it holds x"):
        load_calibration(tmp_path, [X, spec("y", np.float32, "n")])


# refusals: code


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def other(): pass", "load.py has no function 'load'; it has other"),
        ("load = 5", "load.py has no function 'load'; it has nothing"),
        ("def load(", "load.py:load raised SyntaxError: "),
        (
            "import nothing_like_it",
            "load.py:load raised ModuleNotFoundError: No module named 'nothing_like_it' (line 1)",
        ),
        ("def load():\n    return 1 / 0", "load.py:load raised ZeroDivisionError: division by zero (line 2)"),
        (
            "def load():\n    yield {'x': [[1] * 4]}\n    raise OSError('a\\nb')",
            "raised OSError: a b (line 3): it should",
        ),
        ("def load():\n    raise SystemExit(3)", "load.py:load raised SystemExit: 3 (line 2)"),
        ("def load(path): pass", "load.py:load raised TypeError: load() missing 1 required"),
        ("def load(): return 5", "it gave a int, not something that yields dicts of arrays"),
        ("def load(): return None", "it gave a NoneType"),
        ("def load(): yield 5", "load.py:load, dict 0: it gave a int, not a dict of input name -> array"),
        ("def load(): return []", "it holds no samples"),
        ("def load(): yield {'y': 1}", "dict 0: no data for input x; it holds y"),
        ("def load(): yield {'x': [[1], [1, 2]]}", "dict 0: input 'x' is not an array (ValueError: "),
        ("def load(): yield {'x': [[None] * 4]}", "Python objects are pickles"),
        ("def load(): yield {'x': [[float('nan')] * 4]}", "dict 0: input 'x' holds NaN in sample 0"),
    ],
)
def test_user_code_that_fails_is_named(body: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(body)
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        load_calibration(f"{tmp_path / 'load.py'}:load", [X])
    assert "\n" not in str(refusal.value)


def test_a_python_callable_that_fails_is_named() -> None:
    def my_loader() -> Any:
        raise KeyError("pixel_values")

    with pytest.raises(UserError, match=r"my_loader raised KeyError: 'pixel_values'"):
        load_calibration(my_loader, [X])


def test_many_names_are_cut_short() -> None:
    past = [spec(f"past.{index}", np.float32, "n", 4) for index in range(24)]
    with pytest.raises(UserError, match=r"no data for input past\.0, .*, past\.7 and 16 more; it holds x: "):
        load_calibration({"x": numbers()}, [X, *past])


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, snpc.runtime.calibration; print([m for m in ('PIL', 'torch', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def npy64(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("batch", [1, 4])
def test_heads_of_batches(batch: int) -> None:
    """The first samples of each; of a model that takes full batches only, all."""
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    free = load_calibration({"x": rows}, (TensorSpec("x", np.dtype(np.float32), ("n", 2)),), batch=batch)
    starts = range(0, 6, batch)
    for feeds, start in zip(free.first_rows(2), starts, strict=True):
        np.testing.assert_array_equal(feeds["x"], rows[start : start + min(batch, 2)])
    fixed = load_calibration({"x": rows}, (TensorSpec("x", np.dtype(np.float32), (3, 2)),), batch=batch)
    assert [len(feeds["x"]) for feeds in fixed.first_rows(2)] == [3, 3]
