"""Calibration data in files: by the suffix or the contents; .npz, .npy, Polygraphy's JSON and test_data_set_*."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.images import ImageOptions, image_source
from snpc.runtime.calibration.sources import (
    CalibrationPart,
    CalibrationSource,
    as_user_error,
    name_list,
    part_in_memory,
    require_inputs,
)
from snpc.runtime.calibration.text import TextOptions, is_text, text_source
from snpc.runtime.calibration.text_inputs import inputs_to_give, sole_input
from snpc.runtime.io import ArrayHeader, map_npz, read_array_header
from snpc.types import AnyArray, TensorSpec

ModelInputs = tuple[TensorSpec, ...]

READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)  # what numpy and zipfile raise
READ_ADVICE = "it is broken or not what its name says; write it again with numpy"
MAX_FILES = 2_000_000
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
ACCEPTED_SOURCES = (
    "calibration data is an .npz, .npy or .json file, text (.txt or .jsonl), a folder of .npz, .npy or pictures, a "
    "folder with test_data_set_*/input_N.pb, or file.py:function"
)


def path_source(path: Path, inputs: ModelInputs, images: ImageOptions, text: TextOptions) -> CalibrationSource:
    """The source at ``path``: a folder by its contents, a file by its suffix."""
    with as_user_error(str(path), "it cannot be opened; check its permissions", OSError):
        if not path.exists():
            raise UserError(f"{path} does not exist: {ACCEPTED_SOURCES}")
        if path.is_dir():
            return _folder_source(path, inputs, images)
        if not path.is_file():  # reading a pipe would wait for a writer, and a second pass would find nothing
            raise UserError(f"{path}: it is not a regular file: {ACCEPTED_SOURCES}")
    if is_text(path):
        return text_source(path, inputs, text)
    opener = SOURCE_OPENERS.get(path.suffix.lower())
    if opener is not None:
        return opener(path, inputs)
    if path.suffix == ".py":
        raise UserError(f"{path}: name the function too, as in {path}:load_data (it will be run)")
    raise UserError(f"{path}: unknown kind of file '{path.suffix}': {ACCEPTED_SOURCES}")


def _folder_source(path: Path, inputs: ModelInputs, images: ImageOptions) -> CalibrationSource:
    sets = _test_set_folders(path)
    if sets:
        return CalibrationSource(str(path), (_test_set_part(folder, inputs) for folder in sets), inputs)
    files = _visible_files(path.iterdir())
    arrays = [file for file in files if file.suffix.lower() in PART_OPENERS]
    pictures = _pictures_of(files)
    if arrays and pictures:
        kinds = f"arrays ({arrays[0].name}) and pictures ({pictures[0].name})"
        raise UserError(f"{path}: it holds both {kinds}: keep one kind in a folder")
    if arrays:
        return CalibrationSource(
            str(path), (PART_OPENERS[file.suffix.lower()](file, inputs) for file in arrays), inputs
        )
    pictures = pictures or picture_files(path)
    if pictures:
        return image_source(path, pictures, inputs, images)
    raise UserError(
        f"{path}: nothing to calibrate on in this folder ({name_list(file.name for file in files)}): {ACCEPTED_SOURCES}"
    )


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder; where there are none, those in the folders below: often one per class."""
    return _pictures_of(_visible_files(folder.iterdir())) or _pictures_of(_visible_files(_files_below(folder)))


def _pictures_of(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]


def _files_below(path: Path) -> Iterator[Path]:
    """Every file in the folders below; those that may not be entered are passed by. Raises UserError where there are
    more than a data set has, as below ``/``."""
    count = 0
    for folder, _, names in os.walk(path):
        count += 1 + len(names)
        if count > MAX_FILES:
            raise UserError(f"{path}: more than {MAX_FILES} files lie below it: give the folder with the pictures")
        yield from (Path(folder, name) for name in names)


def _visible_files(paths: Iterable[Path]) -> list[Path]:
    """In natural order, without hidden ones (macOS leaves a ``._0001.jpg`` next to each picture)."""
    return sorted((path for path in paths if path.is_file() and not path.name.startswith(".")), key=_natural_key)


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Order in which ``img2`` comes before ``img10``."""
    return [(int(text) if text.isdecimal() else -1, text) for text in re.split(r"(\d+)", str(path))]


# .npz and .npy


def _npz_part(path: Path, inputs: ModelInputs) -> CalibrationPart:
    with as_user_error(str(path), READ_ADVICE, *READ_ERRORS), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        headers = {}
        for member in members:
            with archive.open(member) as file:
                header = read_array_header(file)
                _check_stored_bytes(header, archive.getinfo(member).file_size)
                headers[member.removesuffix(".npy")] = header
    sole = sole_input(inputs)
    if sole is not None and list(headers) == ["arr_0"]:  # np.savez(path, array): numpy made up the name
        headers = {sole.name: headers["arr_0"]}
        return CalibrationPart(str(path), headers, partial(_read_unnamed, path))
    return CalibrationPart(str(path), headers, partial(_read_npz, path))


def _read_unnamed(path: Path, names: Sequence[str]) -> dict[str, AnyArray]:
    """The array that numpy named itself, for the one input there is."""
    return dict.fromkeys(names, _read_npz(path, ["arr_0"])["arr_0"])


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, AnyArray]:
    """Large ones are mapped: only the chosen rows are ever loaded."""
    with as_user_error(str(path), READ_ADVICE, *READ_ERRORS):
        return map_npz(path, names)


def _npy_part(path: Path, inputs: ModelInputs) -> CalibrationPart:
    sole = sole_input(inputs)
    if sole is None:
        raise UserError(
            f"{path}: one array, but the model has {len(inputs)} inputs ({name_list(spec.name for spec in inputs)}): "
            "save an .npz with a key for each"
        )
    with as_user_error(str(path), READ_ADVICE, *READ_ERRORS), path.open("rb") as file:
        headers = {sole.name: read_array_header(file)}
        _check_stored_bytes(headers[sole.name], path.stat().st_size)
    return CalibrationPart(str(path), headers, partial(_read_npy, path))


def _check_stored_bytes(header: ArrayHeader, stored: int) -> None:
    """Raise ValueError where a header claims more than there is; ``stored``: bytes of the file, header and all."""
    if not header.dtype.hasobject and header.bytes > stored:
        raise ValueError(f"its header claims {header.bytes} bytes, {stored} are there")


def _read_npy(path: Path, names: Sequence[str]) -> dict[str, AnyArray]:
    """Mapped, not read: only the chosen rows are ever loaded."""
    with as_user_error(str(path), READ_ADVICE, *READ_ERRORS):
        return dict.fromkeys(names, np.load(path, mmap_mode="r", allow_pickle=False))


def _array_file_source(
    part: Callable[[Path, ModelInputs], CalibrationPart], path: Path, inputs: ModelInputs
) -> CalibrationSource:
    return CalibrationSource(str(path), [part(path, inputs)], inputs, allow_single_sample=False)


# Polygraphy JSON


def _json_source(path: Path, inputs: ModelInputs) -> CalibrationSource:
    advice = "it should hold a list of dicts, input name -> array, as 'polygraphy run --save-inputs' writes it"
    with as_user_error(str(path), advice, OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    feeds = content if isinstance(content, list) else [content]
    parts = []
    for index, feed in enumerate(feeds):
        label = f"{path}, dict {index}"
        if not isinstance(feed, Mapping):
            raise UserError(f"{label}: it is a {type(feed).__name__}: {advice}")
        parts.append(part_in_memory(label, _json_arrays(label, feed, inputs)))
    return CalibrationSource(str(path), parts, inputs)


def _json_arrays(label: str, feed: Mapping[str, Any], inputs: ModelInputs) -> dict[str, AnyArray]:
    """The model's inputs decoded; other keys are ignored."""
    require_inputs(label, feed, inputs_to_give(inputs, feed))
    arrays: dict[str, AnyArray] = {}
    for name in (spec.name for spec in inputs if spec.name in feed):
        advice = f"input '{name}' should be numbers, or an .npy file in base64 under \"array\""
        with as_user_error(label, advice, ValueError, TypeError, EOFError, OSError):
            arrays[name] = _json_array(feed[name])
    return arrays


def _json_array(value: Any) -> AnyArray:
    """Polygraphy wraps arrays as {"array": base64 of .npy}, and lazy arrays once more around that ("values")."""
    while isinstance(value, Mapping):
        inner = [value[key] for key in ("array", "values") if key in value]
        if not inner:
            raise ValueError(f"a dict with {name_list(value)} is no array")
        value = inner[0]
    if not isinstance(value, str):
        return np.array(value)
    array: AnyArray = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
    return array


# test_data_set_*/input_N.pb


def _test_set_folders(path: Path) -> list[Path]:
    """Folders with tensors in them: this one, or those below it."""
    if (path / "input_0.pb").is_file():
        return [path]
    return sorted((folder for folder in path.iterdir() if (folder / "input_0.pb").is_file()), key=_natural_key)


def _test_set_part(folder: Path, inputs: ModelInputs) -> CalibrationPart:
    """The tensors are parsed for their shapes and dropped; ``read`` parses them again."""
    headers = {name: ArrayHeader(array.shape, array.dtype) for name, array in _read_test_set(folder, inputs)}
    return CalibrationPart(str(folder), headers, partial(_read_arrays_of_test_set, folder, inputs))


def _read_arrays_of_test_set(folder: Path, inputs: ModelInputs, names: Sequence[str]) -> dict[str, AnyArray]:
    arrays = dict(_read_test_set(folder, inputs))
    return {name: arrays[name] for name in names}


def _read_test_set(folder: Path, inputs: ModelInputs) -> Iterator[tuple[str, AnyArray]]:
    """(input name, array) of input_0.pb, input_1.pb, ...: the tensor's name where that is an input's, else in order."""
    names = [spec.name for spec in inputs]
    for file in sorted(folder.glob("input_*.pb"), key=_natural_key):
        digits = file.stem.removeprefix("input_")
        number = int(digits) if digits.isdecimal() else len(names)
        name, array = _read_tensor(file)
        if name in names:
            yield name, array
        elif number < len(names):
            yield names[number], array
        else:
            raise UserError(f"{file}: the model has {len(names)} inputs ({name_list(names)}), so there is none for it")


def _read_tensor(file: Path) -> tuple[str, AnyArray]:
    import onnx

    advice = "it is no ONNX tensor; write it with onnx.numpy_helper.from_array(array).SerializeToString()"
    if not file.is_file():
        raise UserError(f"{file}: it is not a regular file; {advice}")
    with as_user_error(str(file), advice, Exception):  # protobuf and onnx raise many kinds on broken bytes
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # it could point anywhere on this machine
            raise UserError(f"{file}: its data lies in another file, which snpc does not follow: store it inside")
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise ValueError("it has no element type")
        return tensor.name, onnx.numpy_helper.to_array(tensor)


PART_OPENERS: dict[str, Callable[[Path, ModelInputs], CalibrationPart]] = {".npz": _npz_part, ".npy": _npy_part}
SOURCE_OPENERS: dict[str, Callable[[Path, ModelInputs], CalibrationSource]] = {
    ".npz": partial(_array_file_source, _npz_part),
    ".npy": partial(_array_file_source, _npy_part),
    ".json": _json_source,
}
