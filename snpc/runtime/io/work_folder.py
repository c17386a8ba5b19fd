"""Work folders: results of finished stages in files, so that a run that was killed goes on from them.

    DIR/statistics-1f0c.../all-5d0e.npz       a stage is a folder: its name, and a digest of all that it depends on
    DIR/trials-9a42.../block_3_ffn-77b1.npz   an entry is a file that is whole or not there

A stage that depends on anything else has another digest, so runs with different inputs share a folder without mixing.
Entries are written under other names and renamed, and two runs that make the same entry write the same, so several
processes can use one folder at once. An entry whose checksum is wrong counts as missing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers its types, so that numpy knows them by name)
import numpy as np

from snpc.errors import UserError
from snpc.runtime.io.atomic import unflushed_write
from snpc.runtime.io.mapped_npz import LOCAL_HEADER, map_npz
from snpc.types import AnyArray

WORK_FORMAT = 1
LIBRARIES = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "torch")
RECORD, DIGEST_DIGITS = "record", 24
ALIGNMENT = 64  # bytes, as numpy aligns the values of an .npy behind its header
ZIP64_FIELD, EXTRA_FIELD = 20, 4  # bytes of zipfile's field for large members, and of the head of another field
EXTRA_PADDING = 0xD935  # the tag that Android's zipalign gives to padding


@dataclass(frozen=True)
class StageEntry:
    """What a stage stored under one name: a ``record`` of JSON values, and arrays, which are mapped from the file."""

    record: Any
    arrays: Mapping[str, AnyArray]


@dataclass
class StageCount:
    """Files that a run found, and those that it made; what it made itself and reads again is not found."""

    found_files: set[Path] = field(default_factory=set)
    made_files: set[Path] = field(default_factory=set)

    @property
    def found(self) -> int:
        return len(self.found_files - self.made_files)

    @property
    def made(self) -> int:
        return len(self.made_files)


@dataclass(frozen=True)
class StoredStage:
    """Results of one stage, by name. Without a ``folder`` nothing is found and nothing is kept."""

    folder: Path | None
    count: StageCount = field(default_factory=StageCount, compare=False)

    def get(self, name: str) -> StageEntry | None:
        """What was stored under ``name``; None where there is nothing, or where the file is damaged, which is said."""
        path = self.path_of(name)
        if path is None or not path.is_file():
            return None
        try:
            entry = read_entry(path, name)
        except Exception as error:  # zipfile, numpy and json fail in many ways on a broken file; all mean the same
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            logging.getLogger(__name__).warning(f"snpc: warning: {path}: damaged ({reason}); it is made again")
            return None
        self.count.found_files.add(path)
        return entry

    def put(self, name: str, record: Any = None, arrays: Mapping[str, AnyArray] | None = None) -> None:
        """Store ``record`` (JSON values) and ``arrays``. Raises UserError where they cannot be written."""
        path = self.path_of(name)
        if path is None:
            return
        make_folder(path.parent)
        with unflushed_write(path) as temporary:
            write_entry(temporary, name, record, arrays or {})
        self.count.made_files.add(path)

    def put_batches(self, name: str, batches: Sequence[Mapping[str, AnyArray]]) -> None:
        """Store the values of every batch, under one name."""
        arrays = {f"{k} {key}": array for k, values in enumerate(batches) for key, array in values.items()}
        self.put(name, [list(values) for values in batches], arrays)

    def get_batches(self, name: str, count: int) -> list[dict[str, AnyArray]] | None:
        """The values of every batch, mapped from their file; None where not those of ``count`` batches are there."""
        entry = self.get(name)
        if entry is None or len(entry.record) != count:
            return None
        return [{key: entry.arrays[f"{k} {key}"] for key in keys} for k, keys in enumerate(entry.record)]

    def remove(self, name: str) -> None:
        """Forget what was stored under ``name``. What is mapped stays readable; where the system has no such
        files, it stays."""
        path = self.path_of(name)
        if path is not None:
            with suppress(OSError):
                path.unlink()

    def path_of(self, name: str) -> Path | None:
        """The file of an entry: its name as far as file names allow, and a digest of it."""
        if self.folder is None:
            return None
        readable = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[-60:]
        return self.folder / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"


NOT_STORED = StoredStage(None)


class WorkFolder:
    """The folder ``path`` in which stages store their results.

    ``counts``: stage -> the entries that this run found in it, and those that it made. Raises UserError where the
    folder is missing and cannot be made.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.counts: dict[str, StageCount] = {}
        make_folder(self.path)

    def stage(self, name: str, *depends: object) -> StoredStage:
        """The results of stage ``name`` for inputs with these values, code and libraries. Where a value has no digest
        (a function of the user that no file holds) they are not stored."""
        try:
            digest = digest_of([WORK_FORMAT, code_digest(), library_versions(), *depends])
        except NoDigest:
            return NOT_STORED
        folder = self.path / f"{re.sub(r'[^a-z]+', '-', name)}-{digest[:DIGEST_DIGITS]}"
        return StoredStage(folder, self.counts.setdefault(name, StageCount()))

    def describe(self) -> str:
        """``work: resumed statistics, 12 of 36 trials from DIR``"""
        ran = {name: count for name, count in self.counts.items() if count.found or count.made}
        found = [text_of(name, count) for name, count in ran.items() if count.found]
        if found:
            return f"work: resumed {', '.join(found)} from {self.path}"
        made = f"nothing to resume in {self.path}; it has {', '.join(ran)} now"
        return f"work: {made if ran else f'no stage ran that keeps anything in {self.path}'}"


def text_of(name: str, count: StageCount) -> str:
    total = count.found + count.made
    return name if count.found == total else f"{count.found} of {total} {name}"


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make this folder ({error.strerror or error}); give another --work") from None


# -- entries ---------------------------------------------------------------------------------------------------------


def write_entry(path: Path, name: str, record: Any, arrays: Mapping[str, AnyArray]) -> None:
    """Types that numpy does not know (bfloat16) are written as bytes, and named in the record."""
    listed = [(key, array.dtype.name if array.dtype.isbuiltin == 2 else "") for key, array in arrays.items()]
    head = json.dumps({"name": name, "arrays": listed, "value": record})
    stored = {RECORD: np.array(head)} | {str(k): as_plain(array) for k, array in enumerate(arrays.values())}
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for key, array in stored.items():
            with archive.open(aligned_member(f"{key}.npy", file.tell()), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def aligned_member(name: str, offset: int) -> zipfile.ZipInfo:
    """A member whose values are aligned in the file, and so in memory where it is mapped: sums over arrays that are not
    are added up in another order. An extra field of the header makes up what lacks."""
    info = zipfile.ZipInfo(name)
    begin = offset + LOCAL_HEADER + len(name) + ZIP64_FIELD + EXTRA_FIELD
    padding = -begin % ALIGNMENT
    info.extra = EXTRA_PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return info


def as_plain(array: AnyArray) -> AnyArray:
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.isbuiltin == 2 else array


def read_entry(path: Path, name: str) -> StageEntry:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("its checksum is wrong")
    arrays = map_npz(path, above=0)
    head = json.loads(str(arrays.pop(RECORD)))
    if head["name"] != name:
        raise ValueError("it is another entry")
    named: dict[str, AnyArray] = {}
    for k, (key, dtype) in enumerate(head["arrays"]):
        named[key] = arrays[str(k)].view(dtype) if dtype else arrays[str(k)]
    return StageEntry(head["value"], named)


# -- digests ---------------------------------------------------------------------------------------------------------


class NoDigest(Exception):
    """A value whose contents are not known, such as a function that is defined nowhere."""


def digest_of(value: object) -> str:
    """SHA-256 of numbers, texts, arrays, sequences, mappings and dataclasses, and what is in them. Raises NoDigest for
    anything else, such as a function."""
    sha = hashlib.sha256()
    for part in digest_parts(value):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def digest_parts(value: object) -> Iterable[bytes]:
    if isinstance(value, np.ndarray):
        yield f"array {value.dtype.str} {value.shape}".encode()
        yield hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).digest()
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for item in fields(value):
            yield from (item.name.encode(), *digest_parts(getattr(value, item.name)))
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from (*digest_parts(key), *digest_parts(value[key]))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)}".encode()
        for element in value:
            yield from digest_parts(element)
    elif value is None or isinstance(value, str | bytes | bool | int | float | np.generic | Path):
        yield f"{type(value).__name__} {value!r}".encode()
    else:
        raise NoDigest(type(value).__name__)


@functools.cache
def code_digest() -> str:
    """Of this package's own code: in a checkout it changes while the version stays."""
    root = Path(__file__).parents[2]
    return digest_of([(str(file.relative_to(root)), file.read_bytes()) for file in sorted(root.rglob("*.py"))])


@functools.cache
def library_versions() -> tuple[str, ...]:
    """Of the libraries that compute: the next version may round otherwise."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} none")
    return tuple(versions)
