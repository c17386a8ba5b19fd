"""Temporary folders. One that a killed process leaves behind is removed by the next that makes a folder there.

Each folder holds a lock file, locked for as long as its owner lives. The kernel frees the lock with the process,
however that ends, so a folder whose lock is free has no owner.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PREFIX = "snpc-"
HIDDEN_PREFIX = ".snpc-"  # of folders beside a user's files
LOCK_FILE = ".lock"
LOCKING_SECONDS = 60  # a lock file that is younger may belong to a process that is about to lock it


class TemporaryFolder:
    """A folder that is deleted with this object, or at exit. ``parent``: where it is made, hidden there; by default in
    the system's folder for temporary files. Raises OSError where it cannot be made."""

    def __init__(self, parent: Path | None = None) -> None:
        prefix = PREFIX if parent is None else HIDDEN_PREFIX
        place = parent or Path(tempfile.gettempdir())
        remove_abandoned_folders(place, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        lock(handle)
        self._finalizer = weakref.finalize(self, delete_folder, self.path, handle)

    def delete(self) -> None:
        self._finalizer()


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A ``TemporaryFolder`` for a block."""
    folder = TemporaryFolder(parent)
    try:
        yield folder.path
    finally:
        folder.delete()


def delete_folder(path: Path, handle: int) -> None:
    with suppress(OSError):
        os.close(handle)  # first: some systems delete no open file
    shutil.rmtree(path, ignore_errors=True)


def lock(handle: int, wait: bool = False) -> bool:
    """Lock a file until it is closed. False where another process holds it, or the file system has no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_abandoned_folders(place: Path, prefix: str) -> None:
    """Remove this user's temporary folders in ``place`` whose process is gone. Others' and unknown ones stay."""
    with suppress(OSError):
        names = [entry.path for entry in os.scandir(place) if entry.name.startswith(prefix)]
        for path in map(Path, names):
            if is_abandoned(path / LOCK_FILE):
                shutil.rmtree(path, ignore_errors=True)


def is_abandoned(lock_file: Path) -> bool:
    try:
        if time.time() - lock_file.lstat().st_mtime < LOCKING_SECONDS:
            return False
        handle = os.open(lock_file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # no folder of snpc's, or another user's
        return False
    try:
        return lock(handle)
    finally:
        os.close(handle)
