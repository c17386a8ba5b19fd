"""Only regular files are replaced, and what is renamed into place is whole."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from snpc.errors import UserError
from snpc.runtime.io.atomic import atomic_write, check_target, is_data_of, recorded_publications

needs_pipes = pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")


@needs_pipes
@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_never_replaced(link: bool, tmp_path: Path) -> None:
    """Nor is a device: /dev/null, written by root, would be a file for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    target = tmp_path / "link" if link else pipe
    if link:
        target.symlink_to(pipe)
    with pytest.raises(UserError, match="is not a regular file"):
        check_target(target)
    with pytest.raises(UserError, match="is not a regular file"), atomic_write(target) as temporary:
        temporary.write_text("x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@needs_pipes
def test_nor_is_one_that_appears_meanwhile(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with pytest.raises(UserError, match="is not a regular file"), atomic_write(pipe) as temporary:
        temporary.write_text("x")
        os.mkfifo(pipe)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_content_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, steps = tmp_path / "file", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    with atomic_write(target) as temporary:
        temporary.write_text("x")
    assert steps == ["flush", "rename", "flush"]  # content, name, the folder that holds the name


def test_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    with atomic_write(tmp_path / ("n" * 255)) as temporary:
        temporary.write_text("x")
    with pytest.raises(UserError, match="cannot write it"), atomic_write(tmp_path / ("n" * 256)) as temporary:
        temporary.write_text("x")


def test_what_was_written_is_known(tmp_path: Path) -> None:
    with recorded_publications() as files:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("x")
        assert files == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("m.onnx.0123456789abcdef.data", True),
        ("m.onnx.data", False),
        ("m.onnx.0123456789abcde.data", False),
        ("n.onnx.0123456789abcdef.data", False),
        ("m.onnx.0123456789abcdef.data.bak", False),
    ],
)
def test_names_of_external_data(name: str, of: bool, tmp_path: Path) -> None:
    assert is_data_of(tmp_path / name, tmp_path / "m.onnx") is of
    assert not is_data_of(tmp_path / "other" / name, tmp_path / "m.onnx")
