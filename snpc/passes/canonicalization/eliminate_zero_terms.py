"""Elimination of zeros that are added: exporters of ``baddbmm`` keep its first term, times a beta of zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, choose_dim_sizes
from snpc.ops import ADD, CONSTANT_OF_SHAPE, MUL, SUB, lookup
from snpc.types import Shape


class EliminateZeroTerms(ir.passes.InPlacePass):
    """Remove sums with a tensor of zeros that is made for the purpose and does not broadcast the other term."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        sums = [(node, index) for node in model.graph if (index := term_beside_zeros(node)) is not None]
        if not sums:
            return ir.passes.PassResult(model, False)
        _, facts = choose_dim_sizes(model)
        modified = False
        for node, index in sums:
            kept = node.inputs[index]
            assert kept is not None
            if node.outputs[0].is_graph_output() or not keeps_shape(node, index, facts):
                continue
            node.outputs[0].replace_all_uses_with(kept)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def term_beside_zeros(node: ir.Node) -> int | None:
    """Of a sum of a value and zeros, the index of the value."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in (ADD, SUB):
        return None
    zeros = [value is not None and uniform_value(value) == 0 for value in node.inputs]
    if zeros == [False, True]:
        return 0
    return 1 if zeros == [True, False] and node.op_type == ADD else None


def keeps_shape(node: ir.Node, index: int, facts: ShapeFacts) -> bool:
    """Whether the zeros beside input ``index`` are no larger than it along any axis, at whatever sizes."""
    kept, zeros = (facts.shape.get(v) if v is not None else None for v in (node.inputs[index], node.inputs[1 - index]))
    if kept is None or zeros is None or len(zeros) > len(kept):
        return False
    aligned: Shape = (1,) * (len(kept) - len(zeros)) + zeros
    return all(zero == 1 or (size > 1 and zero == size) for size, zero in zip(kept, aligned, strict=True))


def uniform_value(value: ir.Value) -> float | None:
    """The finite number that stands at every entry of a value which the graph makes of its shape; None elsewhere."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == CONSTANT_OF_SHAPE:
        fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
        return finite(fill.reshape(-1)[0])
    if node.op_type == MUL:
        numbers = [stored_number(v) if v is None or v.producer() is None else uniform_value(v) for v in node.inputs]
        return None if None in numbers else finite(np.prod(numbers))  # type: ignore[arg-type]
    first = node.inputs[0] if node.inputs else None
    return uniform_value(first) if first is not None and lookup(node.domain, node.op_type).kind == "movement" else None


def stored_number(value: ir.Value | None) -> float | None:
    """The one number that a constant holds."""
    if value is None or value.const_value is None or value.is_graph_input() or value.const_value.size != 1:
        return None
    return finite(value.const_value.numpy().reshape(-1)[0])


def finite(number: object) -> float | None:
    """``number``, unless it is NaN or infinite."""
    found = float(number)  # type: ignore[arg-type]
    return found if np.isfinite(found) else None
