"""Reading ONNX files without their weights: tensors of a kilobyte and more stay where they are in the file.

An ``.onnx`` file is one protobuf message: ModelProto.graph (field 7) holds GraphProto.initializer (5), a TensorProto
each, whose bytes are raw_data (9). ``read_without_weights`` walks those lengths, drops the bytes, and marks
each tensor as external data at its offset in the same file. So a 10 GB model loads in the time that its graph takes,
and weights are read through the page cache when they are needed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

MIN_EXTERNAL_BYTES = 1024  # bytes: smaller tensors (shapes, scalars) stay in the message
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9

WireField = tuple[int, int, int, int]  # number, start of its tag, start and end of its value


def encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def length_prefix(field: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return encode_varint(field << 3 | DELIMITED) + encode_varint(length)


def decode_varint(data: mmap.mmap | bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError("a length is not a number")


def iterate_fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[WireField]:
    """Fields of the message that lies at ``start .. end``. Raises ValueError where lengths do not add up."""
    at = start
    while at < end:
        tag, value = decode_varint(data, at)
        wire_type = tag & 7
        if wire_type == VARINT:
            stop = decode_varint(data, value)[1]
        elif wire_type == FIXED64:
            stop = value + 8
        elif wire_type == FIXED32:
            stop = value + 4
        elif wire_type == DELIMITED:
            length, value = decode_varint(data, value)
            stop = value + length
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if stop > end:
            raise ValueError(f"a field at byte {at} runs past the end")
        yield tag >> 3, at, value, stop
        at = stop


def read_without_weights(path: Path) -> onnx.ModelProto:
    """The model of a file, its big initializers marked external in the file itself. Raises ValueError (or protobuf's
    DecodeError, a ValueError in spirit) where the file is not a whole protobuf message."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return parse_without_weights(data, path.name)
            except IndexError:
                raise ValueError("it ends in the middle of a field") from None


def parse_without_weights(data: mmap.mmap, name: str) -> onnx.ModelProto:
    fields_kept = bytearray()
    model = onnx.ModelProto()
    tensors: list[onnx.TensorProto] = []
    for number, tag, start, end in iterate_fields(data, 0, len(data)):
        if number != GRAPH:
            fields_kept += data[tag:end]
            continue
        graph = bytearray()
        for inner, inner_tag, inner_start, inner_end in iterate_fields(data, start, end):
            if inner == INITIALIZER and inner_end - inner_start >= MIN_EXTERNAL_BYTES:
                tensors.append(tensor_without_data(data, inner_start, inner_end, name))
            else:
                graph += data[inner_tag:inner_end]
        fields_kept += length_prefix(GRAPH, len(graph)) + graph
    model.ParseFromString(bytes(fields_kept))
    model.graph.initializer.extend(tensors)
    return model


def tensor_without_data(data: mmap.mmap, start: int, end: int, name: str) -> onnx.TensorProto:
    fields_kept = bytearray()
    data_span: tuple[int, int] | None = None
    for number, tag, value, stop in iterate_fields(data, start, end):
        if number == RAW_DATA and stop - value >= MIN_EXTERNAL_BYTES:
            data_span = (value, stop - value)
        else:
            fields_kept += data[tag:stop]
    tensor = onnx.TensorProto()
    tensor.ParseFromString(bytes(fields_kept))
    if data_span is not None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", name), ("offset", str(data_span[0])), ("length", str(data_span[1]))):
            tensor.external_data.add(key=key, value=text)
    return tensor
