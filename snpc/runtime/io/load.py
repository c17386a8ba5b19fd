"""Loading models: tensors checked, external data found, the graph in canonical form. Weights are not read."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from snpc.errors import UserError
from snpc.graph import PassObserver
from snpc.passes.canonicalization import canonicalize
from snpc.runtime.io.in_memory import kind_of, write_in_memory
from snpc.runtime.io.protobuf import read_without_weights
from snpc.runtime.io.save import proto_without_weights
from snpc.runtime.io.tensor_checks import all_tensors, check_tensors, external_entry, is_external
from snpc.temporary import TemporaryFolder
from snpc.types import Model, TensorSpec

if TYPE_CHECKING:
    from snpc.runtime.io.in_memory import InMemoryModel

    ModelSource: TypeAlias = str | os.PathLike[str] | InMemoryModel

logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # what it warns of is refused below, in one line


def load(model: ModelSource, observer: PassObserver | None = None) -> Model:
    """Read an ONNX model and bring it into the canonical form (``passes.canonicalization``).

    ``model``: a path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graph of onnx-graphsurgeon. A model in memory
    is not changed; a copy of it lies in a temporary file for as long as the returned value lives. Weights of a
    file stay there and are read when they are needed. ``observer`` is called after each graph pass. Raises UserError
    for anything that is not a readable ONNX model.
    """
    if isinstance(model, (str, os.PathLike)):
        return load_file(Path(model), observer)
    kind, folder = kind_of(model), TemporaryFolder()
    path = folder.path / "model.onnx"
    write_in_memory(model, path)
    return replace(load_file(path, observer), kind=kind, folder=folder)


def load_file(path: Path, observer: PassObserver | None) -> Model:
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file; give the .onnx itself")
    try:
        proto = read_without_weights(path)
    except (DecodeError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: not a readable ONNX file ({error_summary(error)}); is it truncated, or another format?"
        ) from None
    if not proto.graph.node or not proto.opset_import:
        raise UserError(f"{path}: not an ONNX model (it holds no graph); is it truncated, or another format?")
    check_tensors(proto, path)
    digest = file_digest(path, proto)
    try:
        graph = ir.from_proto(proto)
        resolve_external_data(graph, path.parent)
        graph = canonicalize(graph, observer)
        check_producers(graph, path)
        check_serializable(graph)
    except UserError:
        raise
    except Exception as error:  # a malformed graph fails in many ways inside onnx-ir; all mean the same to a user
        why = error_summary(root_cause(error))
        raise UserError(f"{path}: the graph is malformed ({why}); run onnx.checker on it") from None
    external = any(location != path.name for location in external_data_files(proto))
    return Model(
        path,
        graph,
        digest,
        tensor_specs(graph.graph.inputs, graph),
        tensor_specs(graph.graph.outputs, graph),
        external,
    )


def check_serializable(model: ir.Model) -> None:
    """Convert a copy to protobuf, without its weights: a model that cannot be written is refused when it is loaded."""
    copy = model.clone()
    proto_without_weights(copy, set(copy.graph.initializers))


def root_cause(error: BaseException) -> BaseException:
    """The first error in a chain: onnx-ir wraps an error once per level of the message, each with the whole content."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def error_summary(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def resolve_external_data(model: ir.Model, folder: Path) -> None:
    """Give external weights full paths: onnx-ir follows no links below a base folder, and model caches are links."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = with_full_path(value.const_value, str(value.name), folder)
        for node in graph:
            for attribute in [a for a in node.attributes.values() if isinstance(a, ir.Attr)]:
                if isinstance(attribute.value, ir.ExternalTensor):
                    tensor = with_full_path(attribute.value, str(attribute.value.name), folder)
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)


def with_full_path(tensor: ir.ExternalTensor, name: str, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        (folder / tensor.location).resolve(),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir="",
    )


def external_data_files(proto: onnx.ModelProto) -> dict[str, str]:
    """Location of external data -> name of one tensor in it."""
    locations: dict[str, str] = {}
    for tensor in all_tensors(proto):
        if is_external(tensor):
            locations.setdefault(external_entry(tensor, "location"), tensor.name)
    return locations


def check_producers(model: ir.Model, path: Path) -> None:
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.graph is None:
                raise UserError(f"{path}: {node.name} reads {value.name}, which no node produces; export it again")


def file_digest(path: Path, proto: onnx.ModelProto) -> str:
    """sha256 of the file, and of the name, size and three samples of each external file (not of all its bytes)."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    for location in sorted(external_data_files(proto)):
        if location != path.name:
            data = path.parent / location
            size = data.stat().st_size
            sha.update(f"{location}:{size}".encode())
            with data.open("rb") as file:
                for start in (0, max(0, size // 2), max(0, size - (1 << 20))):
                    file.seek(start)
                    sha.update(file.read(1 << 20))
    return sha.hexdigest()


def tensor_specs(values: Any, model: ir.Model) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if value.name in model.graph.initializers:
            continue
        dtype = (
            value.dtype.numpy() if value.dtype is not None and value.dtype != ir.DataType.STRING else np.dtype(object)
        )
        dims = (
            () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value or "") for d in value.shape)
        )
        specs.append(TensorSpec(str(value.name), dtype, dims))
    return tuple(specs)


def file_bytes(path: Path) -> int:
    """Size on disk of a model with its external data."""
    return sum(file.stat().st_size for file in model_files(path) if file.is_file())


def model_files(path: Path) -> set[Path]:
    """The model file and the files of its external data."""
    return {path, *(path.parent / name for name in external_data_files(read_without_weights(path)))}


# -- writing ---------------------------------------------------------------------------------------------------------
