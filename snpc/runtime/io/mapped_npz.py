"""Arrays of .npz files, mapped into memory where they are stored uncompressed (``np.savez``), so that only the rows that
are used are ever read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from snpc.types import AnyArray

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


def map_npz(path: Path, names: Collection[str] | None = None) -> dict[str, AnyArray]:
    """Name -> array, for all or for these ``names``: read-only views of the file, compressed members read into memory.

    Raises what numpy and zipfile raise on a broken file, and KeyError for a name that is not there.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        present = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return {name: read_member(path, file, archive, f"{name}.npy") for name in (present if names is None else names)}


def read_member(path: Path, file: IO[bytes], archive: zipfile.ZipFile, member: str) -> AnyArray:
    """One array: mapped where it is stored as it is."""
    info = archive.getinfo(member)
    with archive.open(member) as stream:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            loaded: AnyArray = np.lib.format.read_array(stream, allow_pickle=False)
            return loaded
        header = read_array_header(stream)
        offset = stream.tell()
    if header.dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    if offset + header.bytes != info.file_size:
        raise ValueError(f"{member}: its header claims {header.bytes} bytes, {info.file_size - offset} are there")
    order = "F" if header.fortran_order else "C"
    if not header.bytes:
        return np.empty(header.shape, header.dtype)
    begin = data_offset(file, info) + offset
    mapped: AnyArray = np.memmap(path, header.dtype, "r", begin, header.shape or (1,), order)
    return mapped.reshape(header.shape, order=order)


def data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin in the file: its own header may be longer than the directory says."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile(f"{info.filename}: no header where the directory says")
    return info.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[k : k + 2], "little") for k in (26, 28))
