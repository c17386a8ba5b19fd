"""Dynamic numbers of tokens: inputs of any length, and methods that decide by content how many tokens stay.

The graph has each number as a named dimension of a step's decisions. Shape parameters that hold a number of tokens (the
target of a reshape) are computed from the stream, and are checked under two choices of the dynamic sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.graph import ShapeFacts
from snpc.ops import GATHER, SHAPE, SUB, WHERE
from snpc.passes.slicing import ShapeParameterEditor
from snpc.passes.token_analysis import TOKEN_AXIS, TokenAxes
from snpc.tokens.methods import TokenMethod, ceil_share
from snpc.tokens.step import TokenStep
from snpc.types import AnyArray

FIXED_LENGTH_ADVICE = "reduce tokens with an export of a fixed length"


def kept_dim_sizes(steps: Sequence[TokenStep]) -> dict[str, int]:
    """Dimension name -> the dynamic sizes of decisions, at each step that computes how many tokens stay."""
    return {
        f"{s.prefix}_{name}": size
        for s in steps
        if s.settings.share is not None
        for name, size in s.method.dynamic_sizes(s.settings).items()
    }


def resize_steps(steps: Sequence[TokenStep], facts: ShapeFacts, nudge: bool = False) -> list[TokenStep]:
    """The same steps under other dynamic sizes. ``nudge``: one token more or less stays where content decides."""
    whole = count = (facts.shape[steps[0].point.stream] or (0, 0))[TOKEN_AXIS]
    resized = []
    for number, step in enumerate(steps):
        count = count if not number or step.follows(steps[number - 1]) else whole
        setting = step.settings
        others = count - setting.leading
        removed = setting.removed
        if setting.share is not None:
            stays = kept_count(step.method, others, step.offline[0] if step.method.input_adaptive else setting.share)
            removed = others - (stays + (-1 if stays > 1 else 1) * (nudge and step.method.input_adaptive))
        resized.append(replace(step, settings=replace(setting, count=count, removed=removed)))
        count -= removed
    return resized


def kept_count(method: TokenMethod, others: int, share: float) -> int:
    """The number of tokens that stay under given dynamic sizes, of which ``share`` stays (on average, where decided by
    content). Fewer than all, so that parameters that hold the number can be told apart."""
    stays = round(others * share) if method.input_adaptive else ceil_share(others, share)
    return max(1, min(stays, others - 1))


def insert_token_count(editor: ShapeParameterEditor, before: ir.Node, stream: ir.Value, prefix: str) -> ir.Value:
    """The number of tokens of ``stream``, [1], by new nodes before ``before``."""
    shape = editor.insert(before, SHAPE, [stream], editor.unused_node_name(f"{prefix}_sizes"))
    axis = editor.constant(np.asarray([TOKEN_AXIS], np.int64), f"{prefix}_axis")
    return editor.insert(before, GATHER, [shape, axis], editor.unused_node_name(f"{prefix}_length"))


def replace_token_counts(
    editor: ShapeParameterEditor, node: ir.Node, index: int, expected: AnyArray, axes: TokenAxes, length: ir.Value
) -> None:
    """Replace the entries of input ``index`` of ``node`` that hold a number of tokens by ``length`` [1], minus the
    leading tokens that ``axes`` says are absent. Raises CheckFailed where another entry differs from ``expected``."""
    current = node.inputs[index]
    now = editor.after.value.get(current) if current is not None else None
    if current is None or now is None or now.shape != expected.shape or now.ndim != 1:
        raise CheckFailed(
            f"{node.op_type} {node.name}: the parameter with the number of tokens is not known; {FIXED_LENGTH_ADVICE}"
        )
    wrong = now != expected
    if not wrong.any():
        return
    leading = {axes.axes.get(int(k), -1) for k in np.flatnonzero(wrong)}
    if len(leading) > 1 or -1 in leading:
        raise CheckFailed(
            f"{node.op_type} {node.name}: its parameter holds more than the number of tokens; {FIXED_LENGTH_ADVICE}"
        )
    name = f"{node.outputs[0].name}_{index}"
    out = leading.pop()
    if out:
        less = editor.constant(np.asarray([out], np.int64), name)
        length = editor.insert(node, SUB, [length, less], editor.unused_node_name(f"{name}__length"))
    which = editor.constant(wrong, f"{name}_which")
    editor.replace_input(
        node, index, editor.insert(node, WHERE, [which, length, current], editor.unused_node_name(f"{name}__shape"))
    )


def check_reduced_shapes(facts: ShapeFacts, expected: Mapping[str, tuple[int, ...]], model: ir.Model) -> None:
    """Raises CheckFailed where a shape of ``model`` under other dynamic sizes is not the ``expected`` one, by name."""
    for node in model.graph:
        for value in node.outputs:
            shape = expected.get(str(value.name))
            if shape is not None and facts.shape.get(value) != shape:
                raise CheckFailed(
                    f"{node.op_type} {node.name}: gives {facts.shape.get(value)}, not {shape}, for inputs of another "
                    f"length; {FIXED_LENGTH_ADVICE}"
                )
