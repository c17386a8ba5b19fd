"""Numbers of tokens that are not fixed: of inputs of any length, and where their contents decide how many stay.

The graph has them as sizes of decisions, by a name per step. What spells a number of tokens (the target of a reshape)
is computed from the stream, and its shapes must come out right under two bindings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph.shapes import ShapeFacts
from snpc.ops.names import GATHER, SHAPE, SUB, WHERE
from snpc.passes.slicing.shape_parameters import ShapeParameterEditor
from snpc.passes.token_analysis.reduction_points import TOKEN_AXIS
from snpc.passes.token_analysis.state import TokenAxes
from snpc.tokens.methods import KEPT_SIZE, StepSettings, TokenMethod, ceil_share
from snpc.tokens.step import TokenStep
from snpc.types import AnyArray

FIXED_LENGTH_ADVICE = "reduce tokens with an export of a fixed length"


def kept_dim_sizes(steps: Sequence[TokenStep]) -> dict[str, int]:
    """How many tokens behind the leading ones stay at each step that computes that, by the name of the size."""
    return {
        f"{s.prefix}_{KEPT_SIZE}": s.settings.others - s.settings.removed for s in steps if s.settings.share is not None
    }


def resize_steps(steps: Sequence[TokenStep], facts: ShapeFacts, nudge: bool = False) -> list[TokenStep]:
    """The same steps under another binding; ``nudge``: one token more or less stays where contents decide."""
    count = (facts.shape[steps[0].point.stream] or (0, 0))[TOKEN_AXIS]
    found = []
    for step in steps:
        setting = step.settings
        others = count - setting.leading
        gone = setting.removed
        if setting.share is not None:
            stays = kept_count(step.method, others, step.offline[0] if step.method.input_adaptive else setting.share)
            gone = others - (stays + (-1 if stays > 1 else 1) * (nudge and step.method.input_adaptive))
        found.append(replace(step, settings=StepSettings(count, setting.leading, gone, setting.share)))
        count -= gone
    return found


def kept_count(method: TokenMethod, others: int, share: float) -> int:
    """How many of so many tokens stay under a binding, where this share of them does (on average, where contents
    decide): fewer than all, so that what their number is spelled by can be seen."""
    stays = round(others * share) if method.input_adaptive else ceil_share(others, share)
    return max(1, min(stays, others - 1))


def insert_token_count(repairs: ShapeParameterEditor, before: ir.Node, stream: ir.Value, prefix: str) -> ir.Value:
    """The number of tokens of ``stream``, [1], computed in front of ``before``."""
    shape = repairs.insert(before, SHAPE, [stream], repairs.unused_node_name(f"{prefix}_sizes"))
    axis = repairs.constant(np.asarray([TOKEN_AXIS], np.int64), f"{prefix}_axis")
    return repairs.insert(before, GATHER, [shape, axis], repairs.unused_node_name(f"{prefix}_length"))


def replace_token_counts(
    repairs: ShapeParameterEditor, node: ir.Node, index: int, wanted: AnyArray, marks: TokenAxes, length: ir.Value
) -> None:
    """Make the entries of input ``index`` of ``node`` that must be a number of tokens be ``length`` [1], less the
    leading ones that ``marks`` says are left out. Raises CheckFailed where that is not what they are."""
    current = node.inputs[index]
    now = repairs.after.value.get(current) if current is not None else None
    if current is None or now is None or now.shape != wanted.shape or now.ndim != 1:
        raise CheckFailed(
            f"{node.op_type} {node.name}: how it spells the number of tokens is not known; {FIXED_LENGTH_ADVICE}"
        )
    wrong = now != wanted
    if not wrong.any():
        return
    leading = {marks.axes.get(int(k), -1) for k in np.flatnonzero(wrong)}
    if len(leading) > 1 or -1 in leading:
        raise CheckFailed(
            f"{node.op_type} {node.name}: it spells more than the number of tokens; {FIXED_LENGTH_ADVICE}"
        )
    name = f"{node.outputs[0].name}_{index}"
    out = leading.pop()
    if out:
        less = repairs.constant(np.asarray([out], np.int64), name)
        length = repairs.insert(node, SUB, [length, less], repairs.unused_node_name(f"{name}__length"))
    which = repairs.constant(wrong, f"{name}_which")
    repairs.replace_input(
        node, index, repairs.insert(node, WHERE, [which, length, current], repairs.unused_node_name(f"{name}__shape"))
    )


def check_reduced_shapes(found: ShapeFacts, wanted: Mapping[str, tuple[int, ...]], model: ir.Model) -> None:
    """Raises CheckFailed where a shape of ``model`` under another binding is not as ``wanted``, by name."""
    for node in model.graph:
        for value in node.outputs:
            shape = wanted.get(str(value.name))
            if shape is not None and found.shape.get(value) != shape:
                raise CheckFailed(
                    f"{node.op_type} {node.name}: gives {found.shape.get(value)}, not {shape}, for inputs of another "
                    f"length; {FIXED_LENGTH_ADVICE}"
                )
