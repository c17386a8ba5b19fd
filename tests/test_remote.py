"""Models and data at URLs: read through fsspec, by this process and by workers."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.remote import is_url
from tests.command_line import CALIB, VIT, invoke
from tests.workers import process_pool

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    """A folder in memory that holds the example, a copy of it with its weights apart, and the data as one file and as
    several."""
    name = f"memory://{request.node.name.replace('[', '-').replace(']', '')}"
    files, root = fsspec.core.url_to_fs(name)
    files.pipe(f"{root}/vit.onnx", VIT.read_bytes())
    files.pipe(f"{root}/calib.npz", CALIB.read_bytes())
    image = np.load(CALIB)["image"]
    for number in range(3):
        with files.open(f"{root}/folder/{number}.npy", "wb") as file:
            np.save(file, image[10 * number : 10 * number + 10])
    return name


def feeds_of(source: str, model: snpc.Model) -> np.ndarray:
    calibration = snpc.load_calibration(source, model.inputs, samples=20, batch=5, held_out=0)
    return np.concatenate([feeds["image"] for feeds in calibration.batches()])


def test_addresses() -> None:
    assert is_url("s3://bucket/model.onnx") and is_url("simplecache::s3://bucket/x") and is_url("memory://a")
    assert not any(map(is_url, ("C://x", "C:/x.onnx", "folder/model.onnx", "data.py:load", Path("s3://b"), "s3://")))


def test_model_and_data_at_urls_are_those_at_paths(bucket: str) -> None:
    remote, local = snpc.load(f"{bucket}/vit.onnx"), snpc.load(VIT)
    assert remote.digest == local.digest
    np.testing.assert_array_equal(feeds_of(f"{bucket}/calib.npz", remote), feeds_of(str(CALIB), local))
    with np.load(CALIB) as arrays:
        pictures = {row.tobytes() for row in arrays["image"][:30]}
    assert {row.tobytes() for row in feeds_of(f"{bucket}/folder", remote)} <= pictures


def test_weights_beside_a_model_come_along(bucket: str, tmp_path: Path) -> None:
    files, root = fsspec.core.url_to_fs(bucket)
    onnx.save(
        onnx.load(VIT), tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=64
    )
    for file in tmp_path.iterdir():
        files.pipe(f"{root}/{file.name}", file.read_bytes())
    remote, local = snpc.load(f"{bucket}/apart.onnx"), snpc.load(tmp_path / "apart.onnx")
    assert remote.digest == local.digest
    assert snpc.analyze(remote).cost == snpc.analyze(local).cost


def test_the_command_line_takes_urls(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    invoke(
        "prune",
        f"{bucket}/vit.onnx",
        "--calib",
        f"{bucket}/calib.npz",
        "--calib-samples",
        16,
        "--ratio",
        0.5,
        "--uniform",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["vit-pruned.onnx"]


@pytest.mark.parametrize("name", ["absent.onnx", "nowhere/absent.onnx"])
def test_what_is_not_there_is_refused(name: str, bucket: str) -> None:
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        snpc.load(f"{bucket}/{name}")


def read_batches(sent: bytes) -> list[np.ndarray]:
    """In a worker process."""
    return [feeds["image"] for feeds in pickle.loads(sent).batches()]


def test_workers_read_the_data_themselves(tmp_path: Path) -> None:
    """They are sent the address, and make a copy of their own."""
    (tmp_path / "calib.npz").write_bytes(CALIB.read_bytes())
    url = f"file://{tmp_path / 'calib.npz'}"
    calibration = snpc.load_calibration(url, snpc.load(VIT).inputs, samples=20, batch=5, held_out=0)
    sent = pickle.dumps(calibration.slice(1, 3))
    assert len(sent) < 10_000
    expected = [feeds["image"] for feeds in list(calibration.batches())[1:3]]
    with process_pool(1) as executor:
        for found, mine in zip(executor.submit(read_batches, sent).result(), expected, strict=True):
            np.testing.assert_array_equal(found, mine)
