"""Which constants of a graph are weights that can be trained, and which of them are one weight written twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import is_float, static_shape
from snpc.ops import lookup
from snpc.passes.canonicalization.shared_constants import original_name

MAX_MASK_VALUE = -1e4  # what a mask adds to scores is at most this


def trainable_names(model: ir.Model) -> list[str]:
    """Names of the float initializers that are weights: they multiply in a contraction, scale or shift a normalised
    or any other activation, or are rows of a table that is looked up in. Scalars, masks, and tables that activations
    are multiplied with (rotary embeddings) are part of the computation and stay as they are.

    Copies that the normal form made of one initializer have one name.
    """
    found = [original_name(v) for v in model.graph.initializers.values() if is_float(v.dtype) and is_trainable(v)]
    return list(dict.fromkeys(found))


def is_trainable(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size <= 1:
        return False
    varying = sum(n > 1 for n in static_shape(tensor))
    return any(is_trainable_use(node, index, varying, tensor) for node, index in consumers_past_movement(value))


def consumers_past_movement(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """(node, input) where a constant is used, seen through movement."""
    for node, index in value.uses():
        spec = lookup(node.domain, node.op_type)
        if spec.kind in ("movement", "concat") and index in (spec.data or (0,)):
            for output in node.outputs:
                yield from consumers_past_movement(output)
        else:
            yield node, index


def is_trainable_use(node: ir.Node, index: int, varying: int, tensor: ir.TensorProtocol) -> bool:
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
    return spec.effect == "scale" and varying == 1


def is_activation(value: ir.Value) -> bool:
    """Is it made of what the model is given, or looked up? (The frequencies of a rotary embedding meet positions.)"""
    seen: set[ir.Value] = set()
    todo = [value]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        node, tensor = here.producer(), here.const_value
        if node is None:
            if is_float(here.dtype) and (tensor is None or sum(n > 1 for n in static_shape(tensor)) > 1):
                return True
            continue
        kind = lookup(node.domain, node.op_type).kind
        if kind in ("contraction", "normalize", "attention"):
            return True
        if kind != "shape":
            todo += [v for v in node.inputs if v is not None]
    return False


def find_ties(model: ir.Model, names: list[str]) -> dict[str, tuple[str, bool]]:
    """Matrices that hold the same numbers as an earlier one: name -> (the earlier one, is it the transpose?)."""
    seen: dict[bytes, str] = {}
    found: dict[str, tuple[str, bool]] = {}
    for name in names:
        value = model.graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        if tensor is None or len(tensor.shape) != 2 or 1 in static_shape(tensor):
            continue
        array = tensor.numpy()
        if float(np.ptp(array.astype(np.float32))) == 0.0:
            continue  # equal constants say nothing
        plain, turned = array_digest(array), array_digest(array.T)
        if plain in seen:
            found[name] = (seen[plain], False)
        elif turned in seen:
            found[name] = (seen[turned], True)
        else:
            seen[plain] = name
    return found


def array_digest(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytes:
    made = np.ascontiguousarray(array)
    return hashlib.sha256(repr((made.shape, made.dtype.name)).encode() + made.tobytes()).digest()
