"""Which constants of a graph are trainable weights, and which of those are one weight stored twice (tied)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.graph import is_float, static_shape
from snpc.ops import lookup
from snpc.passes.canonicalization import original_name

MAX_MASK_VALUE = -1e4  # a constant with an entry this low is a mask that is added to scores


def trainable_names(model: ir.Model) -> list[str]:
    """Names of the float initializers that are weights: factors of a contraction, scales and shifts of a normalization
    or another activation, and embedding tables. Scalars, masks, and tables that activations are multiplied with (rotary
    embeddings) are part of the computation and are not trained.

    Copies that canonicalization made of one initializer have one name.
    """
    names = [original_name(v) for v in model.graph.initializers.values() if is_float(v.dtype) and is_trainable(v)]
    return list(dict.fromkeys(names))


def is_trainable(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size <= 1:
        return False
    long_axes = sum(n > 1 for n in static_shape(tensor))
    return any(is_trainable_use(node, index, long_axes, tensor) for node, index in consumers_past_movement(value))


def consumers_past_movement(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """(node, input index) of a constant's consumers; of a movement node, those of its outputs instead."""
    for node, index in value.uses():
        spec = lookup(node.domain, node.op_type)
        if spec.kind in ("movement", "concat") and index in (spec.data or (0,)):
            for output in node.outputs:
                yield from consumers_past_movement(output)
        else:
            yield node, index


def is_trainable_use(node: ir.Node, index: int, long_axes: int, tensor: ir.TensorProtocol) -> bool:
    spec = lookup(node.domain, node.op_type)
    if spec.kind in ("normalize", "attention"):
        return True
    others = [v for k, v in enumerate(node.inputs) if k != index and v is not None]
    if spec.kind not in ("contraction", "pointwise") or not any(is_activation(v) for v in others):
        return False
    if spec.kind == "contraction":
        return True
    if spec.effect == "add":
        array = tensor.numpy().astype(np.float64)
        return bool(np.isfinite(array).all() and array.min() > MAX_MASK_VALUE)
    return spec.effect == "scale" and long_axes == 1


def is_activation(value: ir.Value) -> bool:
    """Is it computed from the model's float inputs, or looked up in a table? (The positions that a rotary embedding
    multiplies with its frequencies are not.)"""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        node, tensor = current.producer(), current.const_value
        if node is None:
            if is_float(current.dtype) and (tensor is None or sum(n > 1 for n in static_shape(tensor)) > 1):
                return True
            continue
        kind = lookup(node.domain, node.op_type).kind
        if kind in ("contraction", "normalize", "attention"):
            return True
        if kind != "shape":
            pending += [v for v in node.inputs if v is not None]
    return False


def find_ties(model: ir.Model, names: list[str]) -> dict[str, tuple[str, bool]]:
    """Matrices with the same numbers as an earlier one: name -> (the earlier one, whether this is its transpose)."""
    first_by_digest: dict[bytes, str] = {}
    tied: dict[str, tuple[str, bool]] = {}
    for name in names:
        value = model.graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        if tensor is None or len(tensor.shape) != 2 or 1 in static_shape(tensor):
            continue
        array = tensor.numpy()
        if float(np.ptp(array.astype(np.float32))) == 0.0:
            continue  # filled with one number: equal by chance
        digest, transposed = array_digest(array), array_digest(array.T)
        if digest in first_by_digest:
            tied[name] = (first_by_digest[digest], False)
        elif transposed in first_by_digest:
            tied[name] = (first_by_digest[transposed], True)
        else:
            first_by_digest[digest] = name
    return tied


def array_digest(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytes:
    contiguous = np.ascontiguousarray(array)
    header = repr((contiguous.shape, contiguous.dtype.name)).encode()
    return hashlib.sha256(header + contiguous.tobytes()).digest()
