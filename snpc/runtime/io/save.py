"""Writing models: inline, or with external data above the size that protobuf takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from snpc.graph.shapes import weight_bytes
from snpc.runtime.io.atomic import atomic_write, external_data_path
from snpc.runtime.io.protobuf import GRAPH, INITIALIZER, RAW_DATA, length_prefix

PROTOBUF_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; leave room for the graph itself


def save(model: ir.Model, target: Path, external: bool = False) -> None:
    """Write ``model`` to ``target``: weights inside, or beside it in ``<name>.data`` where ``external`` asks for it or
    the model is too big for one protobuf message."""
    weights = sum(weight_bytes(v.const_value) for v in model.graph.initializers.values() if v.const_value is not None)
    if external or weights > PROTOBUF_LIMIT:
        save_external(model, target)
    else:
        with atomic_write(target) as temporary:
            write_inline(model, temporary)


def save_external(model: ir.Model, target: Path) -> None:
    data = external_data_path(target)
    held = {name: v.const_value for name, v in model.graph.initializers.items()}
    big = {name: tensor for name, tensor in held.items() if tensor is not None and is_stored_separately(tensor)}
    offsets: dict[str, tuple[int, int]] = {}
    with atomic_write(data) as temporary:
        with temporary.open("wb") as file:
            for name, tensor in big.items():
                file.seek(-file.tell() % 4096, os.SEEK_CUR)
                start = file.tell()
                file.write(tensor.tobytes())
                offsets[name] = (start, file.tell() - start)
        skeleton = proto_without_weights(model, set(big))
        for name, (offset, length) in offsets.items():
            tensor_proto = skeleton.graph.initializer.add(
                name=name,
                data_type=int(big[name].dtype),
                dims=[int(d) for d in big[name].shape],  # type: ignore[arg-type]
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                tensor_proto.external_data.add(key=key, value=value)
        with atomic_write(target) as head:
            head.write_bytes(skeleton.SerializeToString())


def is_stored_separately(tensor: ir.TensorProtocol | None) -> bool:
    """Written apart from the graph. Small ones too where they lie in another file: the message would refer to that."""
    return tensor is not None and (weight_bytes(tensor) >= 1024 or isinstance(tensor, ir.ExternalTensor))


def proto_without_weights(model: ir.Model, without: set[str]) -> onnx.ModelProto:
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
    big = {name for name, v in model.graph.initializers.items() if is_stored_separately(v.const_value)}
    order = [name for name in model.graph.initializers if name in big]
    skeleton = proto_without_weights(model, big)
    graph = skeleton.graph.SerializeToString()
    skeleton.ClearField("graph")
    sizes = {name: tensor_message_length(name, model.graph.initializers[name].const_value) for name in order}
    total = len(graph) + sum(len(length_prefix(INITIALIZER, size)) + size for size in sizes.values())
    with path.open("wb") as file:
        file.write(skeleton.SerializeToString())
        file.write(length_prefix(GRAPH, total) + graph)
        for name in order:
            message = tensor_message(name, model.graph.initializers[name].const_value)
            file.write(length_prefix(INITIALIZER, sizes[name]))
            for piece in message:
                file.write(piece)


def tensor_message(name: str, tensor: Any) -> tuple[bytes, bytes]:
    """A TensorProto as (fields but the data, data): raw_data is field 9, last and length-delimited."""
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    data = tensor.tobytes()
    return head.SerializeToString() + length_prefix(RAW_DATA, len(data)), data


def tensor_message_length(name: str, tensor: Any) -> int:
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    return int(head.ByteSize() + len(length_prefix(RAW_DATA, tensor.nbytes)) + tensor.nbytes)
