"""Arrays of .npz files: mapped where they lie in the file as they are, else read."""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from snpc.runtime.io.mapped_npz import map_npz

ARRAYS = {
    "a": np.arange(24.0).reshape(2, 3, 4),
    "columns_first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "none": np.empty((0, 5)),
    "scalar": np.array(3),
    "text": np.array(["ab", "c"]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_same_as_numpy_reads(save: object, tmp_path: Path) -> None:
    assert callable(save)
    path = tmp_path / "arrays.npz"
    save(path, **ARRAYS)
    mapped = map_npz(path, above=0)
    assert mapped.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
    assert not mapped["a"].flags.writeable and map_npz(path)["a"].flags.writeable
    assert list(map_npz(path, ["a"])) == ["a"]


def test_a_header_in_the_file_that_is_longer_than_in_the_directory(tmp_path: Path) -> None:
    """Archives that were written to a stream, or repacked by other tools, have extra fields in one place only."""
    path = tmp_path / "arrays.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, ARRAYS["a"])
    np.testing.assert_array_equal(map_npz(path, above=0)["a"], ARRAYS["a"])


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays"):
        map_npz(path, above=0)


def test_the_temporary_file_of_a_compressed_array_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, **ARRAYS)
    part = map_npz(path, ["a"], above=0)["a"][1:]
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(part, ARRAYS["a"][1:])
    del part
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_compressed_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=5000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, zlib.error)):
        map_npz(path, above=0)
    assert list(tmp_path.iterdir()) == [path]
