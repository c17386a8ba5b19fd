"""Casting a model to fp16 or bf16, with float32 inputs and outputs; int8 goes to ``quantize``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from snpc.errors import UserError
from snpc.passes.canonicalization import finalize
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import first_lines
from snpc.runtime.io import PROTOBUF_LIMIT, save
from snpc.targets.base import BuildTarget
from snpc.targets.quantize import quantize_model
from snpc.types import AnyArray, Model, Precision


def cast_model(
    model: Model, target: BuildTarget, precision: Precision, calibration: Calibration | None, folder: Path
) -> tuple[Path, tuple[str, ...]]:
    """(the model at ``precision`` as a file in ``folder``, notes). Unchanged in fp32, and for precisions that the
    target makes itself."""
    path = folder / "source.onnx"
    if precision == "fp32" or precision not in target.graph_precisions:
        save(finalize(model.graph.clone()), path)
        return path, ()
    if precision == "int8":
        assert calibration is not None
        return path, quantize_model(model, calibration, path, target.symmetric_activations)
    proto = convert_to_float16(model, folder)
    if precision == "bf16":
        float16_to_bfloat16(proto, float32_weights(model))
    onnx.save(proto, str(path))
    return path, ()


def convert_to_float16(model: Model, folder: Path) -> onnx.ModelProto:
    """The model in fp16 by onnxruntime's converter; operators without fp16 stay in fp32."""
    whole = folder / "float.onnx"
    save(finalize(model.graph.clone()), whole)
    if whole.stat().st_size > PROTOBUF_LIMIT or whole.with_name(f"{whole.name}.data").exists():
        raise UserError(f"{model.path}: over 2 GB: converting it to half precision is not supported")
    return half_precision(onnx.load(str(whole)), model.path)


def half_precision(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """``proto`` in fp16, with inputs and outputs as they are. UserError, which names ``path``."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        with silence_logging():
            converted = ir.from_proto(convert_float_to_float16(proto, keep_io_types=True))
    except Exception as error:  # the converter has no exceptions of its own
        raise UserError(f"{path}: cannot be converted to fp16: {first_lines(error)}") from None
    converted.graph.sort()  # the converter puts its casts behind the nodes that read them
    sorted_proto: onnx.ModelProto = ir.to_proto(converted)
    return sorted_proto


def float32_weights(model: Model) -> dict[str, AnyArray]:
    weights = {}
    for name, value in model.graph.graph.initializers.items():
        if value.const_value is not None and int(value.const_value.dtype) == onnx.TensorProto.FLOAT:
            weights[name] = value.const_value.numpy()
    return weights


def float16_to_bfloat16(proto: onnx.ModelProto, weights: dict[str, AnyArray]) -> None:
    """Replace fp16 by bfloat16 everywhere; weights are rounded from the float32 ``weights``."""

    def tensor(old: onnx.TensorProto) -> None:
        if old.data_type == onnx.TensorProto.FLOAT16:
            array = numpy_helper.to_array(old)
            source = weights.get(old.name)
            exact = source if source is not None and source.shape == array.shape else array
            old.CopyFrom(numpy_helper.from_array(exact.astype(ml_dtypes.bfloat16), old.name))

    for graph in all_graphs(proto.graph):
        del graph.value_info[:]
        for initializer in graph.initializer:
            tensor(initializer)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.FLOAT16:
                    attribute.i = onnx.TensorProto.BFLOAT16
                if attribute.HasField("t"):
                    tensor(attribute.t)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)


@contextmanager
def silence_logging() -> Iterator[None]:
    """Suppress the log messages and numpy warnings of onnxruntime's tools."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(before)
