"""Loading models: tensors checked, external data found, the graph in canonical form. Weights are not read."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from snpc.errors import UserError
from snpc.graph import (
    MalformedGraphError,
    PassObserver,
    attribute_values,
    error_summary,
    malformed_graph_errors,
    static_shape,
)
from snpc.ops import rolling_pasts
from snpc.passes.canonicalization import canonicalize
from snpc.passes.companions import split_branches
from snpc.passes.propagation import mark_shared_caches
from snpc.remote import copy_beside, is_url, local_copy
from snpc.runtime.io.duplicate_constants import merge_equal_constants
from snpc.runtime.io.graph_checks import check_contractions, check_graph, check_producers
from snpc.runtime.io.in_memory import kind_of, write_in_memory
from snpc.runtime.io.protobuf import read_without_weights
from snpc.runtime.io.save import proto_without_weights, save
from snpc.runtime.io.tensor_checks import (
    all_tensors,
    check_tensors,
    external_entry,
    is_external,
    resolve_external_locations,
)
from snpc.temporary import TemporaryFolder
from snpc.types import Model, TensorSpec

if TYPE_CHECKING:
    from snpc.runtime.io.in_memory import InMemoryModel

    ModelSource: TypeAlias = str | os.PathLike[str] | InMemoryModel

logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # what it warns of is refused below, in one line


def load(model: ModelSource, observer: PassObserver | None = None, *, companions: Sequence[Path | str] = ()) -> Model:
    """Read an ONNX model and bring it into the canonical form (``passes.canonicalization``).

    ``model``: a path, a URL (through fsspec), an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a graph of
    onnx-graphsurgeon. A model in memory is not changed; a copy of it lies in a temporary file for as long as the
    returned value lives. Weights of a file stay there and are read when they are needed. ``observer`` is called after
    each graph pass.

    ``companions``: paths of models with the same weights, which are cut alike and may go on from this one's caches, as
    ``decoder_with_past_model.onnx`` does. A decoder with two branches, ``decoder_model_merged.onnx``, is loaded as its
    branch without a past, with the other one as its companion. Raises UserError for anything that is not a readable
    ONNX model.
    """
    if companions:
        return with_companions(load(model, observer), [load(Path(path)) for path in companions])
    if isinstance(model, str) and is_url(model):
        return load_file(local_model(model), observer)
    if isinstance(model, (str, os.PathLike)):
        return load_file(Path(model), observer)
    kind, folder = kind_of(model), TemporaryFolder()
    path = folder.path / "model.onnx"
    write_in_memory(model, path)
    return replace(load_file(path, observer, folder), kind=kind, folder=folder)


def with_companions(model: Model, companions: Sequence[Model]) -> Model:
    """The model with others that are cut alike; outputs of it that are their caches are marked as such."""
    for companion in companions:
        mark_shared_caches(model.graph, companion.graph)
    return replace(model, companions=(*model.companions, *companions))


def local_model(url: str) -> Path:
    """A copy of the model at ``url`` with the files of its weights. UserError: they cannot be read."""
    path = local_copy(url)
    if path.is_file():
        for location in external_data_files(read_without_weights(path)):
            copy_beside(url, location)
    return path


def refuse_branches(model: Model, what: str) -> None:
    """Raises UserError where ``model`` is a branch of a merged decoder. ``what`` is asked for, which is for one
    graph."""
    if model.merged is not None:
        raise UserError(
            f"{model.merged}: holds two decoders as branches, and {what} takes one graph: give decoder_model.onnx and "
            "decoder_with_past_model.onnx in its place, one after the other"
        )


def load_branches(
    path: Path, branches: Sequence[ir.Model], external: bool, folder: TemporaryFolder, observer: PassObserver | None
) -> Model:
    """The first branch of the merged decoder in ``path``, with the other one as its companion. Copies of both lie in
    ``folder`` for as long as the model lives."""
    models = []
    for name, graph in zip((path.name, f"{path.stem}_with_past.onnx"), branches, strict=True):
        copy = folder.path / "branches" / name
        copy.parent.mkdir(exist_ok=True)
        save(graph, copy, external)
        models.append(replace(load_file(copy, observer), folder=folder))
    return replace(with_companions(models[0], models[1:]), external=external, merged=path)


def load_file(path: Path, observer: PassObserver | None, folder: TemporaryFolder | None = None) -> Model:
    """``folder``: where copies of branches go; None: to one of their own."""
    check_name(path)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not is_file:
        raise UserError(f"{path}: no such file" if not exists else f"{path}: not a file; give the .onnx itself")
    proto = read_checked(path)
    digest = file_digest(path, proto)
    nodes = len(proto.graph.node)
    external = any(location != path.name for location in external_data_files(proto))
    resolve_external_locations(proto, path)
    try:
        stored = from_protobuf(proto)
        branches = split_branches(stored)
        if branches is not None:
            merged = load_branches(path, branches, external, folder or TemporaryFolder(), observer)
            return replace(merged, digest=digest)
        graph = canonicalize(stored, observer)
        check_producers(graph)
        check_contractions(graph)
        check_serializable(graph)
        inputs, outputs = input_specs(graph), tensor_specs(graph.graph.outputs, graph)
    except MalformedGraphError as error:
        raise UserError(f"{path}: {error}; run onnx.checker on it") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Model(
        path,
        graph,
        digest,
        inputs,
        outputs,
        external,
        nodes,
    )


def check_name(path: Path) -> None:
    """Refuse a path that is not UTF-8: neither protobuf nor onnxruntime takes it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: its name is not UTF-8, which onnxruntime needs; rename the file or its folder"
        ) from None


def read_message(path: Path) -> onnx.ModelProto:
    """The message of a model file, its big weights left where they are. Raises UserError."""
    try:
        return read_without_weights(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (DecodeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable ONNX file ({error_summary(error)}); is it truncated, or another format?"
        ) from None


def read_checked(path: Path) -> onnx.ModelProto:
    """The same with its tensors checked."""
    proto = read_message(path)
    if not proto.graph.node or not proto.opset_import:
        raise UserError(f"{path}: not an ONNX model (it holds no graph); is it truncated, or another format?")
    check_tensors(proto, path)
    merge_equal_constants(proto.graph, path)
    return proto


def read_model(path: Path) -> ir.Model:
    """The graph of a model file as it stands, not canonicalized; weights are read when they are needed. UserError."""
    proto = read_checked(path)
    resolve_external_locations(proto, path)
    try:
        return from_protobuf(proto)
    except MalformedGraphError as error:
        raise UserError(f"{path}: {error}; run onnx.checker on it") from None


def from_protobuf(proto: onnx.ModelProto) -> ir.Model:
    """The graph of a message. Raises MalformedGraphError with the innermost reason."""
    with malformed_graph_errors():
        model = ir.from_proto(proto)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:  # what the file says elsewhere of its shape and type may not be true
                value.shape = ir.Shape(static_shape(value.const_value))
                value.dtype = value.const_value.dtype
    check_graph(model)
    return model


def check_serializable(model: ir.Model) -> None:
    """Convert a copy to protobuf, without its weights: a model that cannot be written is refused when it is loaded."""
    with malformed_graph_errors():
        copy = model.clone()
        proto_without_weights(copy, set(copy.graph.initializers))


def external_data_files(proto: onnx.ModelProto) -> dict[str, str]:
    """Location of external data -> name of one tensor in it."""
    locations: dict[str, str] = {}
    for tensor in all_tensors(proto):
        if is_external(tensor):
            locations.setdefault(external_entry(tensor, "location"), tensor.name)
    return locations


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


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Of the inputs, with the capacities of caches of sliding windows."""
    capacities = {
        str(value.name): capacity
        for node in model.graph
        for index, capacity in rolling_pasts(node.domain, node.op_type, attribute_values(node)).items()
        if index < len(node.inputs) and (value := node.inputs[index]) is not None
    }
    return tuple(replace(s, capacity=capacities.get(s.name, 0)) for s in tensor_specs(model.graph.inputs, model))


def tensor_specs(values: Any, model: ir.Model) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if value.name in model.graph.initializers:
            continue
        if value.dtype == ir.DataType.UNDEFINED:
            raise MalformedGraphError(f"{value.name} is an input or output without a type")
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
    """The model file and the files of its external data. Raises UserError."""
    return {path, *(path.parent / name for name in external_data_files(read_message(path)))}
