"""Atomic writes: a file is written in a temporary folder beside its place, flushed to the disk, and renamed.

One file: ``atomic_write``. A model, or several files that belong together: ``staging_folder``, then
``publish.publish_files``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from snpc.errors import UserError
from snpc.temporary import TemporaryFolder

_published: ContextVar[list[Path] | None] = ContextVar("published", default=None)


@contextmanager
def recorded_publications() -> Iterator[list[Path]]:
    """The files that are renamed into place while the block runs: what an interruption leaves."""
    files: list[Path] = []
    token = _published.set(files)
    try:
        yield files
    finally:
        _published.reset(token)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A temporary path that becomes ``target`` when the block ends well."""
    with unflushed_write(target) as temporary:
        yield temporary
        flush(temporary)
    flush_folder(target.parent)
    record_publication(target)


@contextmanager
def unflushed_write(target: Path) -> Iterator[Path]:
    """As ``atomic_write``, for files that need not survive a power cut: those in temporary folders."""
    with staging_folder(target) as folder, write_errors(target):
        temporary = folder / target.name
        yield temporary
        temporary.chmod(0o666 & ~current_umask())
        check_place(target)  # it may have become something else since the block began
        temporary.replace(target)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``. Raises UserError where nothing can be written there."""
    check_place(target)
    with write_errors(target):
        folder = TemporaryFolder(target.parent)
    try:
        yield folder.path
    finally:
        folder.delete()


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turns errors of the file system into one UserError that names ``target``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot write it ({error.strerror or error})") from None


def check_target(target: Path, *sources: Path) -> None:
    """Refuse to write over an input, or where nothing can be written."""
    with write_errors(target):
        for source in sources:
            if target.exists() and source.exists() and target.samefile(source):
                raise UserError(f"{target}: is the input itself; choose another output with -o")
            if is_data_of(source, target):
                raise UserError(
                    f"{target}: the input has its weights in {source.name}, which a new {target.name} replaces; choose "
                    "another output with -o"
                )
    check_place(target)
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} is not writable; choose another output with -o")


def check_place(target: Path) -> None:
    """Raises UserError for a name that no regular file has or can get: devices and pipes are never replaced."""
    with write_errors(target):
        if target.is_dir():
            raise UserError(f"{target}: is a folder; give a file name")
        if os.path.lexists(target) and not target.is_file():
            raise UserError(f"{target}: is not a regular file, and only those are replaced; give another name")
        if not target.parent.is_dir():
            raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")


def is_data_of(file: Path, target: Path) -> bool:
    """Whether ``file`` has a name that ``publish.publish_files`` gives to the external data of ``target``."""
    parts = file.name.removeprefix(f"{target.name}.").split(".")
    named = file.name.startswith(f"{target.name}.") and len(parts) == 2 and parts[1] == "data"
    return named and len(parts[0]) == DIGEST_LENGTH and file.parent.resolve() == target.parent.resolve()


DIGEST_LENGTH = 16  # hexadecimal digits of a digest in a file name


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def record_publication(target: Path) -> None:
    files = _published.get()
    if files is not None:
        files.append(target)


def flush(file: Path) -> None:
    """Push a file's content to the disk: renamed before that, it is lost with the power."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Push the names in a folder to the disk, where the system can do so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
