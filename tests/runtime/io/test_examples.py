"""The shipped digits example: complete, small, accurate as measured here, and honest about what was held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from snpc.errors import UserError
from snpc.runtime.io.examples import EXAMPLES, write_example

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("example") / "not" / "yet" / "there"
    return {path.name: path for path in write_example("digits", folder)}


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_writes_what_it_lists_and_nothing_else(written: dict[str, Path]) -> None:
    assert tuple(written) == EXAMPLES["digits"]
    (folder,) = {path.parent for path in written.values()}
    assert {path.name for path in folder.iterdir()} == set(EXAMPLES["digits"])


def test_sizes_fit_a_package(written: dict[str, Path]) -> None:
    assert written["digits_vit.onnx"].stat().st_size < 2 * MEGABYTE
    assert sum(path.stat().st_size for path in written.values()) < 2.5 * MEGABYTE


def test_model_is_valid_and_looks_like_a_timm_export(written: dict[str, Path]) -> None:
    model = onnx.load(written["digits_vit.onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [17]
    for value, rest in ((model.graph.input[0], [1, 8, 8]), (model.graph.output[0], [10])):
        dims = value.type.tensor_type.shape.dim
        assert (dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == ("batch", rest)
    assert {"/blocks.0/attn/qkv/MatMul", "/blocks.0/mlp/fc1/MatMul"} <= {node.name for node in model.graph.node}


def test_arrays_are_as_documented(written: dict[str, Path]) -> None:
    calib, evaluation = load(written["calib.npz"]), load(written["eval.npz"])
    assert set(calib) == {"image"}
    assert set(evaluation) == {"image", "labels"}
    for images, count in ((calib["image"], 256), (evaluation["image"], 500)):
        assert (images.shape, images.dtype) == ((count, 1, 8, 8), np.float32)
        assert (images.min(), images.max()) == (0.0, 1.0)
    assert (evaluation["labels"].shape, evaluation["labels"].dtype) == ((500,), np.int64)
    assert set(evaluation["labels"]) == set(range(10))


def test_no_image_is_in_both_sets(written: dict[str, Path]) -> None:
    assert not rows(load(written["calib.npz"])["image"]) & rows(load(written["eval.npz"])["image"])


def test_images_and_labels_are_those_of_scikit_learn(written: dict[str, Path]) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    label_of = {image.tobytes(): label for image, label in zip(images, digits.target, strict=True)}
    evaluation = load(written["eval.npz"])
    assert [label_of[image.tobytes()] for image in evaluation["image"]] == evaluation["labels"].tolist()
    assert rows(load(written["calib.npz"])["image"]) <= set(label_of)


@pytest.mark.parametrize("batch", [1, 500])
def test_accuracy_measured_at_any_batch_size(written: dict[str, Path], batch: int) -> None:
    session = ort.InferenceSession(written["digits_vit.onnx"], providers=["CPUExecutionProvider"])
    evaluation = load(written["eval.npz"])
    parts = np.split(evaluation["image"], len(evaluation["image"]) // batch)
    logits = np.concatenate([session.run(["logits"], {"image": part})[0] for part in parts])
    assert (logits.argmax(1) == evaluation["labels"]).mean() >= 0.97


def test_older_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "calib.npz").write_bytes(b"old")
    write_example("digits", tmp_path)
    assert set(load(tmp_path / "calib.npz")) == {"image"}


@pytest.mark.parametrize("name", ["cifar", "", "../digits", "digits/"])
def test_unknown_name_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as refusal:
        write_example(name, tmp_path / "new")
    assert str(refusal.value) == f"there is no example '{name}': snpc ships 'digits'; give one of these names"
    assert not (tmp_path / "new").exists()


def refusal_words(folder: Path) -> str:
    with pytest.raises(UserError) as refusal:
        write_example("digits", folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(("below", "reason"), [((), "File exists"), (("deeper",), "Not a directory")])
def test_a_file_in_the_folders_place_is_refused(tmp_path: Path, below: tuple[str, ...], reason: str) -> None:
    (tmp_path / "taken").write_text("mine")
    folder = (tmp_path / "taken").joinpath(*below)
    expected = f"cannot write example 'digits' to {folder}: {reason}; give a folder that you can write to"
    assert refusal_words(folder) == expected
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_in_a_files_place_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "digits_vit.onnx").mkdir()
    assert refusal_words(tmp_path) == f"{tmp_path / 'digits_vit.onnx'}: is a folder; give a file name"
    assert [path.name for path in tmp_path.iterdir()] == ["digits_vit.onnx"]


def test_a_disk_that_fills_up_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole = Path.write_bytes

    def fill_up(path: Path, data: bytes) -> int:
        write_whole(path, data[: len(data) // 2])
        if "eval" in path.name:
            raise OSError(28, "No space left on device")
        return len(data)

    (tmp_path / "digits_vit.onnx").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", fill_up)
    assert ": No space left on device; " in refusal_words(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits_vit.onnx"]
    assert (tmp_path / "digits_vit.onnx").read_bytes() == b"old"
