"""Atomic writes: under a temporary name beside the target, renamed into place when complete.

One file: ``atomic_write``. A model with external data, under a name of its own while it is verified:
``rename_into_place`` or ``discard_model``. Several files that belong together: ``staging_folder`` and
``move_into_place``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx

from snpc.errors import UserError


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A temporary path in ``target``'s folder that becomes ``target`` when the block ends well."""
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot write there ({error.strerror})") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write it ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def external_data_path(target: Path) -> Path:
    """The file beside ``target`` for weights that do not fit into it, or that were external before."""
    return target.parent / f"{target.name}.data"


def check_target(target: Path, *sources: Path) -> None:
    """Refuse to write over an input, or where nothing can be written."""
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"{target}: is the input itself; choose another output with -o")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give a file name with -o")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target}: the folder {target.parent} is not writable; choose another output with -o")


def rename_into_place(temporary: Path, target: Path) -> None:
    """Rename a model that was written to ``temporary``, and its external data to the name that goes with ``target``."""
    data = external_data_path(temporary)
    with atomic_write(target) as final:
        if data.is_file():
            head = onnx.load(str(temporary), load_external_data=False)
            for entry in (e for t in head.graph.initializer for e in t.external_data if e.key == "location"):
                entry.value = external_data_path(target).name
            final.write_bytes(head.SerializeToString())
            data.replace(external_data_path(target))
        else:
            temporary.replace(final)


def discard_model(path: Path) -> None:
    """Delete a model and its external data, where they are."""
    path.unlink(missing_ok=True)
    external_data_path(path).unlink(missing_ok=True)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, deleted afterwards; its folder ``work`` is for files that are not kept."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot write there ({error.strerror})") from None
    try:
        (folder / "work").mkdir()
        yield folder
    except OSError as error:
        raise UserError(f"{target}: cannot write it ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Move finished files into ``folder``, the first one last: it refers to the others."""
    for file in reversed(files):
        file.replace(folder / file.name)
    return tuple(folder / file.name for file in files)
