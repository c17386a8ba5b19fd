"""Writing models: weights inside the file, or in a file beside it. No weight is held in memory twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_from_external, convert_tensors_to_external

from snpc.graph import weight_bytes
from snpc.runtime.io.atomic import write_errors
from snpc.runtime.io.protobuf import GRAPH, INITIALIZER, RAW_DATA, length_prefix

PROTOBUF_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; leave room for the graph itself
PAGE = 4096  # bytes: runtimes map weights into memory page by page


def external_data_path(target: Path) -> Path:
    """The file beside ``target`` to which ``save`` writes external weights."""
    return target.parent / f"{target.name}.data"


def save(model: ir.Model, target: Path | str, external: bool = False) -> None:
    """Write ``model`` to ``target``: weights inside, or beside it in ``<name>.data`` where ``external`` asks for it or
    the model is too big for one protobuf message.

    For temporary and staging folders: ``publish_files`` brings a model to a user's folder.
    """
    target = Path(target)
    weights = sum(weight_bytes(v.const_value) for v in model.graph.initializers.values() if v.const_value is not None)
    if external or weights > PROTOBUF_LIMIT:
        save_external(model, target)
    else:
        with written_whole(target) as part:
            write_inline(model, part)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that becomes it when the block ends well: a model may be written over the file from
    which its weights are read."""
    part = target.with_name(f"{target.name}.part")
    with write_errors(target):
        try:
            yield part
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def save_external(model: ir.Model, target: Path) -> None:
    """Write the graph to ``target`` and its weights to the file beside it, each at a multiple of ``PAGE`` bytes.

    Not by ``onnx_ir.save``: it refuses weights of strings, and describes every weight once more as a value.
    """
    data = external_data_path(target)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    weights = {name: tensor for name, tensor in tensors.items() if tensor is not None and is_stored_separately(tensor)}
    with written_whole(data) as part:
        stored = convert_tensors_to_external(
            list(weights.values()), part.parent, part.name, alignment=PAGE, align_threshold=0
        )
        proto = proto_without_weights(model, set(weights))
        for name, tensor in zip(weights, stored, strict=True):
            message = ir.to_proto(tensor)
            message.name = name
            next(entry for entry in message.external_data if entry.key == "location").value = data.name
            proto.graph.initializer.append(message)
        with written_whole(target) as head:
            head.write_bytes(proto.SerializeToString())


def is_stored_separately(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor is written after the graph: from 1 kB on, and all external ones, which would stay external."""
    return tensor is not None and (weight_bytes(tensor) >= 1024 or isinstance(tensor, ir.ExternalTensor))


def proto_without_weights(model: ir.Model, without: set[str]) -> onnx.ModelProto:
    """The model as protobuf, without the weights named ``without``; ``model`` computes the same afterwards."""
    embed_inner_tensors(model)
    values = {name: model.graph.initializers[name] for name in without}
    tensors = {name: value.const_value for name, value in values.items()}
    try:
        for value in values.values():
            value.const_value = None
        for name in without:
            del model.graph.initializers[name]
        return ir.to_proto(model)
    finally:
        for name, value in values.items():
            value.const_value = tensors[name]
            model.graph.initializers[name] = value


def embed_inner_tensors(model: ir.Model) -> None:
    """Read external tensors of attributes and subgraphs into memory, in place: only initializers of the main graph are
    written from their file, and a reference to it would stand in the output with its full path."""
    functions = [function.graph for function in model.functions.values()]
    outer = (model.graph, *functions)
    for graph in (*outer, *(inner for function in outer for inner in function.subgraphs())):
        for value in () if graph is model.graph else graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = in_memory_tensor(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, in_memory_tensor(attribute.value))
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    tensors = [in_memory_tensor(t) for t in attribute.as_tensors()]
                    node.attributes[name] = ir.AttrTensors(name, tensors)


def in_memory_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor itself, or a copy in memory of one that lies in a file."""
    return convert_tensors_from_external([tensor])[0] if isinstance(tensor, ir.ExternalTensor) else tensor


def write_inline(model: ir.Model, path: Path) -> None:
    """One protobuf message: the graph's other fields first, then its weights one by one."""
    big = {name for name, v in model.graph.initializers.items() if is_stored_separately(v.const_value)}
    order = [name for name in model.graph.initializers if name in big]
    skeleton = proto_without_weights(model, big)
    graph = skeleton.graph.SerializeToString()
    skeleton.ClearField("graph")
    lengths = {name: tensor_message_length(name, model.graph.initializers[name].const_value) for name in order}
    total = len(graph) + sum(len(length_prefix(INITIALIZER, size)) + size for size in lengths.values())
    with path.open("wb") as file:
        file.write(skeleton.SerializeToString())
        file.write(length_prefix(GRAPH, total) + graph)
        for name in order:
            tensor: Any = model.graph.initializers[name].const_value
            file.write(length_prefix(INITIALIZER, lengths[name]) + tensor_message_head(name, tensor))
            tensor.tofile(file)


def tensor_message_head(name: str, tensor: Any) -> bytes:
    """A TensorProto up to its data: raw_data is field 9, last and length-delimited."""
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    fields: bytes = head.SerializeToString()
    return fields + length_prefix(RAW_DATA, tensor.nbytes)


def tensor_message_length(name: str, tensor: Any) -> int:
    return len(tensor_message_head(name, tensor)) + int(tensor.nbytes)
