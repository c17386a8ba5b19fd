"""Checks of the tensors in a model file: types, shapes, numbers of bytes, and where external data may lie.

No weight is read. Each error names the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import Message
from onnx import TensorProto, helper

from snpc.errors import UserError

MAX_AXES = 64  # of an array in numpy 2
MAX_EMPTY_SIZES = 1 << 20  # product of the sizes of an empty tensor that are not 0


def fields_with_tensors() -> dict[str, tuple[str, ...]]:
    """Full name of a message -> its fields that lead to tensors, read off the message types themselves: a field that a
    later ONNX adds is not forgotten."""
    tensor = TensorProto.DESCRIPTOR
    kinds: dict[str, Any] = {}
    queue: list[Any] = [onnx.ModelProto.DESCRIPTOR, onnx.FunctionProto.DESCRIPTOR]
    while queue:
        kind = queue.pop()
        if kind.full_name not in kinds:
            kinds[kind.full_name] = kind
            queue += [field.message_type for field in kind.fields if field.message_type is not None]
    leading = {tensor.full_name}
    while True:
        more = {
            name
            for name, kind in kinds.items()
            if any(field.message_type is not None and field.message_type.full_name in leading for field in kind.fields)
        }
        if more <= leading:
            break
        leading |= more
    return {
        name: tuple(
            field.name
            for field in kinds[name].fields
            if field.message_type is not None and field.message_type.full_name in leading
        )
        for name in leading - {tensor.full_name}
    }


FIELDS_WITH_TENSORS = fields_with_tensors()


def all_tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor in a message, wherever it stands: initializers, attributes of nodes, defaults of functions, their
    bodies, subgraphs, values and indices of sparse tensors, graphs for training."""
    if isinstance(message, TensorProto):
        yield message
        return
    for name in FIELDS_WITH_TENSORS.get(message.DESCRIPTOR.full_name, ()):
        content = getattr(message, name)
        if not isinstance(content, Message):
            for inner in content:
                yield from all_tensors(inner)
        elif message.HasField(name):
            yield from all_tensors(content)


def is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def external_entry(tensor: TensorProto, key: str) -> str:
    """One entry of a tensor's external data, "" where it is missing; of equal keys the last one counts, as in onnx."""
    return next((e.value for e in reversed(tensor.external_data) if e.key == key), "")


def required_bytes(tensor: TensorProto) -> int:
    """Bytes that the tensor's shape and type need. Raises ValueError for an unknown type."""
    dtype = ir.DataType(tensor.data_type)
    if dtype == ir.DataType.UNDEFINED:
        raise ValueError("no type")
    count: int = math.prod(tensor.dims)
    return -(-count * dtype.bitwidth // 8)  # in integers: damaged sizes go beyond what a float holds


def check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Raises UserError for a tensor with an impossible shape, type, number of bytes or location."""
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise UserError(f"{path}: {name} is a sparse weight, which snpc does not read; export it dense")
    file_sizes: dict[str, int] = {}
    for tensor in all_tensors(model):
        check_sizes(tensor, path)
        try:
            required = required_bytes(tensor) if tensor.data_type != TensorProto.STRING else None
        except (ValueError, TypeError):
            raise UserError(
                f"{path}: {tensor.name} is of type {tensor.data_type}, which this ONNX does not know; "
                "update onnx and onnx_ir, or export it again"
            ) from None
        if is_external(tensor) and tensor.data_type == TensorProto.STRING:
            raise UserError(f"{path}: {tensor.name} has strings in another file, where ONNX puts none; export it again")
        if is_external(tensor):
            location = external_entry(tensor, "location")
            if location not in file_sizes:
                file_sizes[location] = external_file(location, path).stat().st_size
        actual = (
            actual_bytes(tensor, path, file_sizes.get(external_entry(tensor, "location"), 0))
            if required is not None
            else required
        )
        if actual != required:
            needed = required if required is not None and required < 1 << 63 else "more than any file has"
            raise UserError(f"{path}: {tensor.name} holds {actual} bytes, its shape needs {needed}; export it again")


def check_sizes(tensor: TensorProto, path: Path) -> None:
    """Refuse sizes that no tensor has: negative ones, more axes than numpy has, and a long axis of a tensor without
    entries, which needs no bytes in the file but is numbered, entry by entry, in the analysis."""
    sizes = list(tensor.dims)
    subject = f"{path}: {tensor.name} has the shape {sizes[:8]}"
    if any(n < 0 for n in sizes):
        raise UserError(f"{subject}; export it again")
    if len(sizes) > MAX_AXES:
        raise UserError(f"{subject} and so on, {len(sizes)} axes; export it again")
    if 0 in sizes and math.prod(n for n in sizes if n) > MAX_EMPTY_SIZES:
        raise UserError(f"{subject}, a long axis without entries; export it again")


def actual_bytes(tensor: TensorProto, path: Path, file_size: int) -> int:
    """Bytes that a tensor has; ``file_size`` is the size of the file with its external data."""
    if is_external(tensor):
        return external_length(tensor, path, file_size)
    return len(tensor.raw_data) if tensor.HasField("raw_data") else typed_data_bytes(tensor)


def typed_data_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor whose values are in a typed field such as ``float_data``."""
    dtype = ir.DataType(tensor.data_type)
    count = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        count //= 2
    return math.ceil(count * max(dtype.itemsize, 1))  # one entry holds a byte of packed types


def external_file(location: str, path: Path) -> Path:
    """The file at ``location``, all links resolved, which the model at ``path`` may read.

    It must lie in the model's folder or below: in that of the path, or, where the model is itself a link (model caches
    keep the files of a model as links into one folder), in that of the file behind it. Raises UserError.
    """
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise UserError(f"{path}: its weights are in {location}, outside its folder; move them beside the model")
    file = path.parent / location
    try:
        exists = bool(location) and file.is_file()
        target = file.resolve()
    except (ValueError, OSError, RuntimeError):  # a name that no file can have, links in a circle
        exists, target = False, file
    if not exists:
        raise UserError(
            f"{path}: its weights are in {location[:200] or 'a file without a name'}, which is not beside it; "
            "copy that file next to the model"
        )
    if not any(target.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise UserError(
            f"{path}: its weights are in {location}, a link to {target} outside its folder; copy that file into the "
            "folder in place of the link"
        )
    return target


def resolve_external_locations(model: onnx.ModelProto, path: Path) -> None:
    """Put the full path of its file into every external tensor, in place: onnx-ir looks for relative ones in the
    current folder where they stand in functions, and follows no links."""
    files: dict[str, Path] = {}
    for tensor in all_tensors(model):
        if is_external(tensor):
            location = external_entry(tensor, "location")
            if location not in files:
                files[location] = external_file(location, path)
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(files[location])


def external_length(tensor: TensorProto, path: Path, file_size: int) -> int:
    """Length in bytes of a tensor's external data, which must lie within its file of ``file_size`` bytes."""
    required = required_bytes(tensor)
    try:
        offset = int(external_entry(tensor, "offset") or 0)
        length = int(external_entry(tensor, "length") or required)
        if offset < 0 or length < 0:
            raise ValueError("negative")
    except ValueError:
        raise UserError(
            f"{path}: {tensor.name} lies at offset {external_entry(tensor, 'offset')[:50]!r} with length "
            f"{external_entry(tensor, 'length')[:50]!r}, which are no numbers of bytes; export it again"
        ) from None
    if length == required and offset + length > file_size:
        raise UserError(
            f"{path.parent / external_entry(tensor, 'location')}: too short for {tensor.name} "
            f"({offset + length} bytes needed, "
            f"{file_size} there); the download may be truncated"
        )
    return length
