"""Which values are never below zero."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import is_stored_constant
from snpc.ops import CLIP, KEEPS_SIGN, NOT_NEGATIVE, POW, lookup

DEEPEST = 16  # nodes upstream that are looked at


def is_never_negative(value: ir.Value | None, depth: int = 0) -> bool:
    """Whether a value is at least zero whatever the inputs are, as far as ``DEEPEST`` nodes in front of it tell."""
    if value is None or depth > DEEPEST:
        return False
    if is_stored_constant(value):
        tensor = value.const_value
        return tensor is not None and tensor.dtype.is_floating_point() and bool((tensor.numpy() >= 0).all())
    node = value.producer()
    if node is None:
        return False
    operator = (node.domain, node.op_type)
    if operator in NOT_NEGATIVE or is_square(node):
        return True
    if node.op_type == CLIP:
        return len(node.inputs) > 1 and is_never_negative(node.inputs[1], depth + 1)
    spec = lookup(*operator)
    if spec.kind in ("movement", "concat") or operator in KEEPS_SIGN:
        read = node.inputs if spec.data is None or spec.kind == "concat" else [node.inputs[k] for k in spec.data]
        return all(is_never_negative(v, depth + 1) for v in read if v is not None)
    return False


def is_square(node: ir.Node) -> bool:
    """A product of a value with itself, or an even power."""
    spec = lookup(node.domain, node.op_type)
    if spec.effect == "scale" and len(node.inputs) == 2:
        return node.inputs[0] is node.inputs[1]
    exponent = node.inputs[1] if node.op_type == POW else None
    if exponent is None or exponent.const_value is None:
        return False
    return bool((exponent.const_value.numpy() % 2 == 0).all())
