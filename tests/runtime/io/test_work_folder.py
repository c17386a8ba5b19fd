"""What a stage stored is found again, whole, and for the same inputs only."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from snpc.errors import UserError
from snpc.runtime.io.work_folder import WorkFolder, digest_of


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {
        "a/b:0": values,
        "columns first": np.asfortranarray(values),
        "half": values.astype(ml_dtypes.bfloat16),
        "none": np.empty((0, 3), np.int64),
        "one": np.array(2.5),
    }
    record = {"x": 0.1 + 0.2, "infinite": float("inf"), "list": [1, None]}
    WorkFolder(tmp_path).stage("numbers", 1).put("block.3/ffn", record, arrays)
    found = WorkFolder(tmp_path).stage("numbers", 1).get("block.3/ffn")
    assert found is not None and found.record == record
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_arrays_are_mapped_and_aligned(tmp_path: Path) -> None:
    """Unaligned arrays are summed in another order, so a resumed run would round otherwise."""
    stage = WorkFolder(tmp_path).stage("numbers")
    stage.put("all", arrays={f"n{k}": np.arange(k + 1.0) for k in range(9)})
    found = stage.get("all")
    assert found is not None
    for array in found.arrays.values():
        assert not array.flags.owndata and array.ctypes.data % 64 == 0
    with np.load(next(tmp_path.rglob("*.npz"))) as plain:  # and numpy alone reads the file
        np.testing.assert_array_equal(plain["8"], np.arange(9.0))


def test_other_inputs_find_nothing(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path)
    folder.stage("numbers", "model", {"ratio": 0.5}, np.zeros(3)).put("all", 1)
    for depends in (("other", {"ratio": 0.5}, np.zeros(3)), ("model", {"ratio": 0.4}, np.zeros(3))):
        assert folder.stage("numbers", *depends).get("all") is None
    assert folder.stage("numbers", "model", {"ratio": 0.5}, np.ones(3)).get("all") is None
    assert folder.stage("numbers", "model", {"ratio": 0.5}, np.zeros(3)).get("other") is None
    assert folder.stage("others", "model", {"ratio": 0.5}, np.zeros(3)).get("all") is None
    assert folder.stage("numbers", "model", {"ratio": 0.5}, np.zeros(3)).get("all") is not None


@dataclass(frozen=True)
class Pair:
    left: object
    right: object


def test_digests_tell_values_apart() -> None:
    values = [
        ("ab", "c"), ("a", "bc"), ("abc",), (("ab",), "c"), (1, 2), (1.0, 2), (True, 2), ("1", 2), None, [None],
        {"a": 1}, {"a": 2}, Pair(1, 2), Pair(2, 1), np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)),
        np.array(1.0), Path("a"), "a", b"a",
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_what_has_no_digest_is_not_stored(tmp_path: Path) -> None:
    """A function of the caller may be another one in the next run."""
    stage = WorkFolder(tmp_path).stage("numbers", lambda a, b: 0.0)
    stage.put("all", 1)
    assert stage.get("all") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "moved"])
def test_a_damaged_entry_is_missing_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = WorkFolder(tmp_path).stage("numbers")
    stage.put("all", 7, {"a": np.arange(100.0)})
    stage.put("other", 8)
    file = stage.path_of("all")
    assert file is not None
    content = file.read_bytes()
    middle = content.index(np.float64(50.0).tobytes())
    flipped = bytes([content[middle + 6] ^ 1])
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "flipped": content[: middle + 6] + flipped + content[middle + 7 :],
            "emptied": b"",
            "moved": next(path for path in file.parent.iterdir() if path != file).read_bytes(),
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert stage.get("all") is None
    assert str(file) in caplog.text and "made again" in caplog.text
    stage.put("all", 7)
    again = stage.get("all")
    assert again is not None and again.record == 7


def write_entries(folder: Path, rounds: int) -> None:
    stage = WorkFolder(folder).stage("numbers")
    for k in range(rounds):
        stage.put(str(k % 3), k % 3, {"a": np.full(20000, k % 3)})


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    """At no time is there a half-written entry."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_entries, args=(tmp_path, 60)) for _ in range(2)]
    for writer in writers:
        writer.start()
    stage, seen = WorkFolder(tmp_path).stage("numbers"), 0
    while any(writer.is_alive() for writer in writers):
        for k in range(3):
            entry = stage.get(str(k))
            if entry is not None:
                seen += 1
                assert entry.record == k and (entry.arrays["a"] == k).all()
    assert [writer.exitcode for writer in writers] == [0, 0] and seen
    assert len(list(tmp_path.rglob("*.npz"))) == 3 and stage.get("0") is not None


def test_what_was_resumed_in_words(tmp_path: Path) -> None:
    first = WorkFolder(tmp_path)
    assert first.describe() == f"work: no stage ran that keeps anything in {tmp_path}"
    for number in (1, 2):
        first.stage("trials").put(str(number), number)
    first.stage("statistics").put("all")
    assert first.describe() == f"work: nothing to resume in {tmp_path}; it has trials, statistics now"
    second = WorkFolder(tmp_path)
    second.stage("statistics").get("all")
    for number in (1, 2, 3):
        if second.stage("trials").get(str(number)) is None:
            second.stage("trials").put(str(number), number)
    assert second.describe() == f"work: resumed statistics, 2 of 3 trials from {tmp_path}"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make this folder"):
        WorkFolder(tmp_path / "file" / "work")
