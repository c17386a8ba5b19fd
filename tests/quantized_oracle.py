"""The oracle of quantized files: the stored file with the codes of removed units at their zero points, everything else
as it is, must say what the written file says. Codes are changed one by one, by another way than the package goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.shared_constants import original_name
from snpc.planning import SlicePlan, cuts_of
from snpc.types import StoredConstant

Array = npt.NDArray[Any]


def silenced(path: Path, analysis: Analysis, plan: SlicePlan, target: Path) -> Path:
    """The stored file with the codes of removed positions at their zero points."""
    model, form = onnx.load(path), analysis.model.quantized
    assert form is not None
    stored = {t.name: t for t in model.graph.initializer}
    tensors = {name: stored[original_name(v)] for name, v in form.graph.graph.initializers.items()
               if original_name(v) in stored}  # fmt: skip
    for (name, axis), removed in cuts_of(plan).items():
        if name in form.constants:
            silence(tensors, form.constants[name], axis, removed)
        else:
            floats = numpy_helper.to_array(tensors[name]).copy()
            np.moveaxis(floats, axis, 0)[removed] = 0
            tensors[name].CopyFrom(numpy_helper.from_array(floats, name))
    onnx.save(model, target)
    return target


def silence(tensors: Mapping[str, onnx.TensorProto], constant: StoredConstant, axis: int, removed: Array) -> None:
    held = {part: numpy_helper.to_array(tensors[name]) for part, name in constant.parts.items()}
    codes, name = held["codes"].copy(), constant.parts["codes"]
    if constant.layout == "product":
        silence_packed(codes, held.get("zero"), constant.attributes, axis, removed)
    else:
        zero = np.broadcast_to(zero_points(held, constant), codes.shape)
        where = np.zeros(codes.shape, bool)
        np.moveaxis(where, axis, 0)[removed] = True
        codes = np.where(where, zero, codes.astype(np.int64)).astype(codes.dtype)
    tensors[name].CopyFrom(numpy_helper.from_array(codes, name))


def zero_points(held: Mapping[str, Array], constant: StoredConstant) -> Array:
    """Of every code of a tensor that is not packed."""
    zero = held.get("zero", np.zeros((), np.int8)).astype(np.int64)
    shape = held["codes"].shape
    if constant.block:
        return zero.repeat(constant.block, constant.axis)[tuple(slice(n) for n in shape)] if zero.ndim else zero
    if zero.size == 1:
        return zero.reshape(())
    return zero.reshape([-1 if k == constant.axis % len(shape) else 1 for k in range(len(shape))])


def silence_packed(codes: Array, zero: Array | None, attributes: Mapping[str, Any], axis: int, removed: Array) -> None:
    """In the bytes [N, blocks, bytes of a block] of a MatMulNBits, in place, one code after the other."""
    bits, block = int(attributes["bits"]), int(attributes["block_size"])
    mask, per_byte = (1 << bits) - 1, 8 // bits
    columns = len(codes)
    for column in range(columns):
        for row in range(int(attributes["K"])):
            if not removed[row if axis == 0 else column]:
                continue
            where = column, row // block, (row % block) // per_byte
            point = 1 << (bits - 1)
            if zero is not None:
                packed = zero.reshape(columns, -1)[column, row // block // per_byte]
                point = int(packed) >> (bits * (row // block % per_byte)) & mask
            shift = bits * (row % per_byte)
            codes[where] = int(codes[where]) & ~(mask << shift) | point << shift


def relative(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2)))
