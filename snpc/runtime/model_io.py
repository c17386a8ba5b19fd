"""Files in, files out: load a model as it is, write one without ever holding its bytes twice.

Writing goes to a temporary file beside the target and is renamed, so a crash or a full disk leaves what was there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from snpc.errors import UserError
from snpc.graph.shapes import weight_bytes
from snpc.passes.canonicalization.canonicalize import canonicalise
from snpc.runtime.intake import check_tensors, entry, is_external, tensors
from snpc.runtime.wire import GRAPH, INITIALIZER, RAW_DATA, delimited, skim
from snpc.types import Model, TensorSpec

LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; leave room for the graph itself

logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # what it warns of is refused below, in one line


def load(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file and bring it into the normal form (see ``passes.canonicalise``).

    External data stays where it is and is read when needed. Raises UserError for anything that is not a readable
    ONNX model.
    """
    where = Path(path)
    if not where.is_file():
        raise UserError(
            f"{where}: no such file" if not where.exists() else f"{where}: not a file; give the .onnx itself"
        )
    try:
        proto = skim(where)
    except (DecodeError, ValueError, OSError) as error:
        raise UserError(
            f"{where}: not a readable ONNX file ({first_line(error)}); is it truncated, or another format?"
        ) from None
    if not proto.graph.node or not proto.opset_import:
        raise UserError(f"{where}: not an ONNX model (it holds no graph); is it truncated, or another format?")
    check_tensors(proto, where)
    digest = digest_of(where, proto)
    try:
        graph = ir.from_proto(proto)
        set_base(graph, where.parent)
        graph = canonicalise(graph)
        check_values(graph, where)
        rehearse(graph)
    except UserError:
        raise
    except Exception as error:  # a malformed graph fails in many ways inside onnx-ir; all mean the same to a user
        why = first_line(innermost(error))
        raise UserError(f"{where}: the graph is malformed ({why}); run onnx.checker on it") from None
    external = any(location != where.name for location in external_files(proto))
    return Model(where, graph, digest, specs(graph.graph.inputs, graph), specs(graph.graph.outputs, graph), external)


def rehearse(model: ir.Model) -> None:
    """Copy it and spell it as a message, weights left out: what cannot be written later is better refused now."""
    copy = model.clone()
    skeleton_proto(copy, set(copy.graph.initializers))


def innermost(error: BaseException) -> BaseException:
    """onnx-ir wraps an error once per level of the message, each with its whole content."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def set_base(model: ir.Model, folder: Path) -> None:
    """Tie weights to their files by full paths: onnx-ir reads no links below a base, and caches of models are links."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = based(value.const_value, str(value.name), folder)
        for node in graph:
            for attribute in [a for a in node.attributes.values() if isinstance(a, ir.Attr)]:
                if isinstance(attribute.value, ir.ExternalTensor):
                    tensor = based(attribute.value, str(attribute.value.name), folder)
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)


def based(tensor: ir.ExternalTensor, name: str, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        (folder / tensor.location).resolve(),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir="",
    )


def external_files(proto: onnx.ModelProto) -> dict[str, str]:
    """location -> a tensor that lies there."""
    found: dict[str, str] = {}
    for tensor in tensors(proto):
        if is_external(tensor):
            found.setdefault(entry(tensor, "location"), tensor.name)
    return found


def check_values(model: ir.Model, where: Path) -> None:
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.graph is None:
                raise UserError(f"{where}: nothing makes {value.name}, which {node.name} reads; export it again")


def digest_of(where: Path, proto: onnx.ModelProto) -> str:
    """sha256 of the file; of external data its name, size and ends (reading 14 GB to name a model is not worth it)."""
    sha = hashlib.sha256()
    with where.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    for location in sorted(external_files(proto)):
        if location != where.name:
            data = where.parent / location
            size = data.stat().st_size
            sha.update(f"{location}:{size}".encode())
            with data.open("rb") as file:
                for start in (0, max(0, size // 2), max(0, size - (1 << 20))):
                    file.seek(start)
                    sha.update(file.read(1 << 20))
    return sha.hexdigest()


def specs(values: Any, model: ir.Model) -> tuple[TensorSpec, ...]:
    found = []
    for value in values:
        if value.name in model.graph.initializers:
            continue
        dtype = (
            value.dtype.numpy() if value.dtype is not None and value.dtype != ir.DataType.STRING else np.dtype(object)
        )
        dims = (
            () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value or "") for d in value.shape)
        )
        found.append(TensorSpec(str(value.name), dtype, dims))
    return tuple(found)


def file_bytes(path: Path) -> int:
    """Size on disk of a model with the external data it names."""
    return sum(file.stat().st_size for file in model_files(path) if file.is_file())


def model_files(path: Path) -> set[Path]:
    """A model and the external data it names."""
    return {path, *(path.parent / name for name in external_files(skim(path)))}


# -- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
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


def data_file(target: Path) -> Path:
    """Where weights go that do not fit into ``target``, or that were external before."""
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


def save(model: ir.Model, target: Path, external: bool = False) -> None:
    """Write ``model`` to ``target``: weights inside, or beside it in ``<name>.data`` where ``external`` asks for it or
    the model is too big for one protobuf message."""
    weights = sum(weight_bytes(v.const_value) for v in model.graph.initializers.values() if v.const_value is not None)
    if external or weights > LIMIT:
        save_external(model, target)
    else:
        with replacing(target) as temporary:
            write_inline(model, temporary)


def save_external(model: ir.Model, target: Path) -> None:
    data = data_file(target)
    held = {name: v.const_value for name, v in model.graph.initializers.items()}
    big = {name: tensor for name, tensor in held.items() if tensor is not None and is_big(tensor)}
    offsets: dict[str, tuple[int, int]] = {}
    with replacing(data) as temporary:
        with temporary.open("wb") as file:
            for name, tensor in big.items():
                file.seek(-file.tell() % 4096, os.SEEK_CUR)
                start = file.tell()
                file.write(tensor.tobytes())
                offsets[name] = (start, file.tell() - start)
        skeleton = skeleton_proto(model, set(big))
        for name, (offset, length) in offsets.items():
            tensor_proto = skeleton.graph.initializer.add(
                name=name,
                data_type=int(big[name].dtype),
                dims=[int(d) for d in big[name].shape],  # type: ignore[arg-type]
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                tensor_proto.external_data.add(key=key, value=value)
        with replacing(target) as head:
            head.write_bytes(skeleton.SerializeToString())


def is_big(tensor: ir.TensorProtocol | None) -> bool:
    """Written apart from the graph. Small ones too where they lie in another file: the message would refer to that."""
    return tensor is not None and (weight_bytes(tensor) >= 1024 or isinstance(tensor, ir.ExternalTensor))


def skeleton_proto(model: ir.Model, without: set[str]) -> onnx.ModelProto:
    """The model's message without the weights named ``without``."""
    held = {name: model.graph.initializers[name] for name in without}
    kept = {name: value.const_value for name, value in held.items()}
    try:
        for value in held.values():
            value.const_value = None
        for name in without:
            del model.graph.initializers[name]
        return ir.to_proto(model)
    finally:
        for name, value in held.items():
            value.const_value = kept[name]
            model.graph.initializers[name] = value


def write_inline(model: ir.Model, path: Path) -> None:
    """One protobuf message, its weights streamed one by one behind the graph's other fields."""
    big = {name for name, v in model.graph.initializers.items() if is_big(v.const_value)}
    order = [name for name in model.graph.initializers if name in big]
    skeleton = skeleton_proto(model, big)
    graph = skeleton.graph.SerializeToString()
    skeleton.ClearField("graph")
    sizes = {name: tensor_length(name, model.graph.initializers[name].const_value) for name in order}
    total = len(graph) + sum(len(delimited(INITIALIZER, size)) + size for size in sizes.values())
    with path.open("wb") as file:
        file.write(skeleton.SerializeToString())
        file.write(delimited(GRAPH, total) + graph)
        for name in order:
            message = tensor_message(name, model.graph.initializers[name].const_value)
            file.write(delimited(INITIALIZER, sizes[name]))
            for piece in message:
                file.write(piece)


def tensor_message(name: str, tensor: Any) -> tuple[bytes, bytes]:
    """A TensorProto as (fields but the data, data): raw_data is field 9, last and length-delimited."""
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    data = tensor.tobytes()
    return head.SerializeToString() + delimited(RAW_DATA, len(data)), data


def tensor_length(name: str, tensor: Any) -> int:
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    return int(head.ByteSize() + len(delimited(RAW_DATA, tensor.nbytes)) + tensor.nbytes)
