"""Files at URLs (``s3://``, ``gs://``), by way of fsspec: copied to a temporary folder, once per process."""

from __future__ import annotations

import re
import threading
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from snpc.errors import UserError
from snpc.temporary import TemporaryFolder

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(::[a-zA-Z][a-zA-Z0-9+.-]+)*://.")  # one letter is a drive of Windows

_COPIES: dict[str, tuple[TemporaryFolder, Path]] = {}
_COPIES_LOCK = threading.Lock()


def is_url(text: object) -> bool:
    return isinstance(text, str) and URL.match(text) is not None


def local_copy(url: str) -> Path:
    """The file or folder at ``url``, copied. UserError: it cannot be read, or fsspec is missing."""
    with _COPIES_LOCK:
        if url not in _COPIES:
            folder = TemporaryFolder()
            _COPIES[url] = folder, copy_to(url, folder.path / PurePosixPath(url.rstrip("/")).name)
        return _COPIES[url][1]


def copy_beside(url: str, name: str) -> None:
    """Copy also the file ``name`` that lies beside ``url``, to the same folder: the weights of a model."""
    target = local_copy(url).parent / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_to(f"{url.rpartition('/')[0]}/{name}", target)


def copied_from(path: Path) -> str | None:
    """The URL that the file at ``path`` is a copy of; None where it is none."""
    return next((url for url, (_, copy) in _COPIES.items() if copy == path), None)


def copy_to(url: str, target: Path) -> Path:
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: files at URLs need fsspec: pip install snpc[cluster]") from None
    try:
        files, path = fsspec.core.url_to_fs(url)
        if not files.exists(path):
            raise FileNotFoundError("there is nothing at this address")
        files.get(path, str(target), recursive=bool(files.isdir(path)))
    except Exception as error:  # every file system has errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{url}: cannot be read ({reason}): look at the address, and at who may read it") from None
    return target


class RemoteReader:
    """A function that reads a file below the copy of ``url``, for any process: each makes its own copy. ``read``: the
    function with its first arguments, paths below ``copy`` among them."""

    def __init__(self, url: str, copy: Path, read: partial[Any]) -> None:
        self.url, self.copy, self.read = url, copy, read

    def __call__(self, *arguments: Any) -> Any:
        here = local_copy(self.url)
        given = (here / a.relative_to(self.copy) if isinstance(a, Path) else a for a in self.read.args)
        return self.read.func(*given, *arguments)
