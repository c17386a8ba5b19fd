"""Checks of the tensors in a model file: types, shapes, numbers of bytes, and where external data may lie.

No weight is read. Each error names the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from snpc.errors import UserError


def all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and those in attributes, of subgraphs and functions too."""
    yield from graph_tensors(model.graph)
    for function in model.functions:
        yield from node_tensors(function.node)


def graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from graph_tensors(graph)


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
    return math.ceil(count * dtype.itemsize)


def check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Raises UserError for a tensor with an impossible shape, type, number of bytes or location."""
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise UserError(f"{path}: {name} is a sparse weight, which snpc does not read; export it dense")
    file_sizes: dict[str, int] = {}
    for tensor in all_tensors(model):
        if any(n < 0 for n in tensor.dims):
            raise UserError(f"{path}: {tensor.name} has the shape {list(tensor.dims)[:8]}; export it again")
        try:
            required = required_bytes(tensor) if tensor.data_type != TensorProto.STRING else None
        except (ValueError, TypeError):
            raise UserError(
                f"{path}: {tensor.name} is of type {tensor.data_type}, which this ONNX does not know; "
                "update onnx and onnx_ir, or export it again"
            ) from None
        if is_external(tensor):
            check_external_location(tensor, path, file_sizes)
        actual = (
            actual_bytes(tensor, path, file_sizes.get(external_entry(tensor, "location"), 0))
            if required is not None
            else required
        )
        if actual != required:
            raise UserError(f"{path}: {tensor.name} holds {actual} bytes, its shape needs {required}; export it again")


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


def check_external_location(tensor: TensorProto, path: Path, file_sizes: dict[str, int]) -> None:
    """Refuse external data outside the model's folder. Adds the file's size to ``file_sizes``."""
    location = external_entry(tensor, "location")
    if location in file_sizes:
        return
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise UserError(f"{path}: its weights are in {location}, outside its folder; move them beside the model")
    file = path.parent / location
    try:
        exists = bool(location) and file.is_file()
    except (ValueError, OSError):  # a name that no file can have
        exists = False
    if not exists:
        raise UserError(
            f"{path}: its weights are in {location[:200] or 'a file without a name'}, which is not beside it; "
            "copy that file next to the model"
        )
    file_sizes[location] = file.stat().st_size


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
