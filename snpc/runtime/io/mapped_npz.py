"""Arrays of .npz files. Large ones are mapped into memory, so that only rows that are used are read.

Arrays that are stored uncompressed are mapped from the file itself, compressed ones are unpacked into a temporary file
for as long as they are used. What is mapped from the file itself is not compared with its checksum.
"""

from __future__ import annotations

import math
import mmap
import weakref
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from snpc.errors import UserError
from snpc.temporary import TemporaryFolder
from snpc.types import AnyArray

MAPPED_BYTES = 32 << 20  # arrays of more bytes are mapped, others read
CHUNK = 1 << 20
LOCAL_HEADER = 30  # bytes of a member's header in front of its name; the lengths of name and extra field end it


class ArrayHeader(NamedTuple):
    """Shape and type of an array that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_array_header(file: IO[bytes]) -> ArrayHeader:
    """Shape and type of an .npy stream, which is left where the values begin. Raises ValueError where it is none."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return ArrayHeader(shape, dtype, fortran_order)


def map_npz(path: Path, names: Collection[str] | None = None, above: int = MAPPED_BYTES) -> dict[str, AnyArray]:
    """Name -> array, for all or for these ``names``: views of the file that cannot be written, or arrays in memory
    where they have not more bytes than ``above``.

    Raises what numpy and zipfile raise on a broken file, KeyError for a name that is not there, and UserError where the
    system's folder for temporary files has no room.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # one for all: a process may open so many files
        present = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        arrays: dict[str, AnyArray] = {}
        for name in present if names is None else names:
            info = archive.getinfo(f"{name}.npy")
            mapped = info.file_size > above
            arrays[name] = map_member(path, view, archive, info) if mapped else read_member(archive, info)
        return arrays


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> AnyArray:
    with archive.open(info) as stream:
        array: AnyArray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def map_member(path: Path, view: mmap.mmap, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> AnyArray:
    """A view of the file where the array is stored as it is, else of a temporary file."""
    with archive.open(info) as stream:
        if info.compress_type != zipfile.ZIP_STORED:
            return unpacked(stream, path)
        header = read_array_header(stream)
        offset = stream.tell()
    if header.dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    if offset + header.bytes != info.file_size:
        raise ValueError(
            f"{info.filename}: its header claims {header.bytes} bytes, {info.file_size - offset} are there"
        )
    if not header.bytes:
        return np.empty(header.shape, header.dtype)
    begin = data_offset(view, info) + offset
    return np.ndarray(header.shape, header.dtype, view, begin, order="F" if header.fortran_order else "C")


def unpacked(stream: IO[bytes], path: Path) -> AnyArray:
    """The array of a compressed member, mapped from a temporary file that is deleted with it."""
    folder = TemporaryFolder()
    target = folder.path / "array.npy"
    try:
        with target.open("wb") as file:
            for chunk in iter(lambda: stream.read(CHUNK), b""):
                write_chunk(file, chunk, path)
        array: AnyArray = np.load(target, mmap_mode="r", allow_pickle=False)
    except BaseException:
        folder.delete()
        raise
    weakref.finalize(array, folder.delete)
    return array


def write_chunk(file: IO[bytes], chunk: bytes, path: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise UserError(
            f"{Path(file.name).parents[1]}: no room to unpack {path} ({error.strerror or error}): set TMPDIR, or save "
            "it with np.savez, uncompressed"
        ) from None


def data_offset(view: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin in the file: its own header may be longer than the directory says."""
    header = view[info.header_offset : info.header_offset + LOCAL_HEADER]
    if len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile(f"{info.filename}: no header where the directory says")
    return info.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[k : k + 2], "little") for k in (26, 28))
