"""Temporary folders go with their owner; of an owner that was killed, with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from snpc.temporary import HIDDEN_PREFIX, LOCK_FILE, LOCKING_SECONDS, TemporaryFolder, temporary_folder
from tests.command_line import process_environment

KILLED = (
    "import os, signal, sys; from pathlib import Path; from snpc.temporary import TemporaryFolder;"
    "folder = TemporaryFolder(Path(sys.argv[1])); (folder.path / 'weights').write_bytes(b'w');"
    "os.kill(os.getpid(), signal.SIGKILL)"
)


def make_older(folder: Path) -> None:
    """So that its lock file is not one that is about to be locked."""
    lock_file = folder / LOCK_FILE
    then = lock_file.stat().st_mtime - 2 * LOCKING_SECONDS
    os.utime(lock_file, (then, then))


def test_it_goes_with_the_block_and_with_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as path:
        assert path.parent == tmp_path
        (path / "file").write_text("x")
    folder = TemporaryFolder()
    assert folder.path.is_dir()
    del folder
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no locks that end with a process")
def test_the_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=process_environment(), check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "weights").is_file()
    with temporary_folder(tmp_path):  # the lock file is too young to tell
        assert left.is_dir()
    make_older(left)
    with temporary_folder(tmp_path):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_in_use_and_folders_of_others_stay(tmp_path: Path) -> None:
    foreign = tmp_path / f"{HIDDEN_PREFIX}notes"
    foreign.mkdir()
    with temporary_folder(tmp_path) as first:
        make_older(first)
        with temporary_folder(tmp_path):
            assert first.is_dir()
    assert list(tmp_path.iterdir()) == [foreign]
