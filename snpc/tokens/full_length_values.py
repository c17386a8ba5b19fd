"""The dense model's values at the tokens that are left: all tokens are computed, and taken out behind each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from snpc.graph import ShapeFacts
from snpc.passes.token_analysis import TOKEN_AXIS
from snpc.tokens.methods import TokenStream
from snpc.tokens.open import batch_dimension, decision_input
from snpc.tokens.step import TokenStep
from snpc.tokens.writer import TokenGraphBuilder


def full_length_values(
    model: ir.Model, facts: ShapeFacts, steps: Sequence[TokenStep], names: Sequence[str]
) -> tuple[ir.Model, dict[str, str]]:
    """A copy of ``model``, the decisions of ``steps`` as inputs; and by the name of a value, that of the value
    [B, N', D] which has the same of the tokens that the steps leave there, merged ones averaged.

    Of a value that has no tokens any more, and of one in front of all steps, it is the value itself.
    """
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    batch, types = batch_dimension(model), facts.types_by_name
    decided = {
        step.prefix: [decision_input(copy, step, k, batch, types[step.point.value]) for k in range(len(step.names))]
        for step in steps
    }
    shapes = facts.shapes_by_name
    shown: dict[str, str] = {}
    for number, name in enumerate(names):
        stream = TokenStream(values[name], None)
        for step in steps_in_front(steps, name, shapes):
            writer = TokenGraphBuilder(copy.graph, f"{step.prefix}_target_{number}", types[step.point.value])
            stream = step.method.reduce(writer, step.settings, stream, decided[step.prefix])
        shown[name] = str(stream.values.name)
    copy.graph.sort()
    return copy, shown


def steps_in_front(steps: Sequence[TokenStep], name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[TokenStep]:
    """The steps whose tokens the value of this name has. The last layer of a classifier has the class token only."""
    return [
        step
        for step in steps
        if name != step.point.value
        and any(value.name == name for value in step.flow.axes)
        and shapes[name][TOKEN_AXIS] == shapes[step.point.value][TOKEN_AXIS]
    ]
