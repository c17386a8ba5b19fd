"""Publishing: finished files of a staging folder get their names, so that a fault at any step leaves old or new files.

External data of a model gets a name of its own, which holds a digest of its content. So the data of an older model is
not replaced, and both heads find theirs; the head is renamed last, and the older model's data is removed after that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx

from snpc.runtime.io.atomic import (
    DIGEST_LENGTH,
    check_place,
    current_umask,
    flush,
    flush_folder,
    is_data_of,
    record_publication,
    write_errors,
)
from snpc.runtime.io.load import external_data_files
from snpc.runtime.io.protobuf import read_without_weights
from snpc.runtime.io.tensor_checks import all_tensors
from snpc.temporary import lock

TIED_SUFFIXES = (".xml", ".bin")  # OpenVINO finds the second by the name of the first


def publish_files(files: Sequence[Path], target: Path) -> tuple[Path, ...]:
    """Move finished files into ``target``'s folder, the first one as ``target`` and last: it refers to the others.

    External data of an ``.onnx`` file goes with it, and is not named in ``files``. Returned are all files, where they
    are now. Raises UserError where that fails; what is at ``target`` is then the old file or the new one.
    """
    with write_errors(target):
        return rename_all(planned_moves(files, target), target)


def planned_moves(files: Sequence[Path], target: Path) -> list[tuple[Path, Path]]:
    """(file, its place) of each file, ready to be renamed: with the usual permissions, and flushed to the disk."""
    moves: list[tuple[Path, Path]] = []
    for k, file in enumerate(files):
        final = target if k == 0 else target.parent / file.name
        data = named_data(file, final) if file.suffix == ".onnx" else []
        moves += [(file, final), *data]
    for file, final in moves:
        file.chmod(file.stat().st_mode | (0o666 & ~current_umask()))
        flush(file)
        check_place(final)
    return moves


def rename_all(moves: Sequence[tuple[Path, Path]], target: Path) -> tuple[Path, ...]:
    with one_publisher(target.parent):
        if {f.suffix for f, _ in moves} >= set(TIED_SUFFIXES) and target.exists():
            target.unlink()  # no digest tells one pair from another: rather no model for a moment than a mixed one
        for file, final in reversed(moves):
            file.replace(final)
            record_publication(final)
        flush_folder(target.parent)
        named = {final for _, final in moves}
        for path in [f for _, f in moves if f.suffix == ".onnx"]:
            remove_old_data(path, named)
    return tuple(final for _, final in moves)


def named_data(head: Path, target: Path) -> list[tuple[Path, Path]]:
    """(file, its place) of the external data of ``head``, which is changed to refer to those places."""
    locations = {}
    for location in external_data_files(read_without_weights(head)):
        data = head.parent / location
        if location != head.name:
            locations[location] = f"{target.name}.{content_digest(data)}.data"
    if locations:
        rename_locations(head, locations)
    return [(head.parent / old, target.parent / new) for old, new in locations.items()]


def rename_locations(head: Path, names: dict[str, str]) -> None:
    """Let the weights of ``head`` refer to files of other names."""
    proto = onnx.load(str(head), load_external_data=False)
    for entry in (e for tensor in all_tensors(proto) for e in tensor.external_data if e.key == "location"):
        entry.value = names.get(entry.value, entry.value)
    head.write_bytes(proto.SerializeToString())


def content_digest(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()[:DIGEST_LENGTH]


def remove_old_data(head: Path, keep: set[Path]) -> None:
    """Remove external data of earlier models at ``head``."""
    for path in [Path(entry.path) for entry in os.scandir(head.parent)]:
        if is_data_of(path, head) and path not in keep:
            with suppress(OSError):
                path.unlink()


def discard_model(path: Path) -> None:
    """Delete a published model and its external data."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        remove_old_data(path, set())


@contextmanager
def one_publisher(folder: Path) -> Iterator[None]:
    """Only one process at a time renames files in ``folder``, where the system has such locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)
