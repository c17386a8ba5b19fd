"""Side inputs: tensors with one entry per token that are not computed from the token stream.

Examples are masks, position tables and the weights of a mean that leaves padding out.
"""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import dependent_values, is_constant_along, used_values
from snpc.passes.token_analysis.state import NeedsSideInput, SideInput, TokenAxes, TokenNodeContext, TokenPin


def check_side_input(context: TokenNodeContext, index: int, axes: dict[int, int], pairs: bool) -> None:
    """Record input ``index``, which has an entry per token along ``axes``, as a side input.

    ``pairs``: it has an entry per pair of tokens. Raises TokenPin if its entries cannot be gathered as the tokens are;
    a side input with equal entries along ``axes`` needs one of them only.
    """
    value = context.node.inputs[index]
    assert value is not None
    uniform = is_constant_along(context.model, context.facts, value, tuple(axes))
    if depends_on_tokens(context, value) or not (uniform or can_gather_entries(context, index, axes)):
        positions = "every pair of positions" if pairs else "every position"
        raise side_input_error(
            context,
            index,
            axes,
            f"tokens are combined with {context.input_name(index)}, which has an entry for {positions}",
        )
    context.flow.side_inputs.append(SideInput(context.node, index, axes, uniform, context.input_name(index)))


def depends_on_tokens(context: TokenNodeContext, value: ir.Value) -> bool:
    """Whether ``value`` is computed from the token stream. A mask over pairs of tokens of which one axis is already
    followed is not."""
    return value in context.flow.axes and value in dependent_values(context.model, [context.flow.stream])


def can_gather_entries(context: TokenNodeContext, index: int, axes: dict[int, int]) -> bool:
    """Whether the entries of kept tokens can be gathered from input ``index`` along ``axes``.

    They can from a computed mask, [batch or 1, .., queries, keys], and from a stored table, [1, ..].
    """
    value, shape = context.node.inputs[index], context.call.shape(index)
    assert value is not None
    if any(axes.values()) or min(axes) == 0:
        return False
    if value.const_value is not None:
        return len(shape) >= 3 and shape[0] == 1
    return len(shape) == 4 and shape[0] in (1, stream_batch_size(context))


def stream_batch_size(context: TokenNodeContext) -> int:
    """Batch size of the token stream."""
    return (context.facts.shape[context.flow.stream] or (0,))[0]


def side_input_error(context: TokenNodeContext, index: int, axes: dict[int, int], reason: str) -> TokenPin:
    """The exception to raise where input ``index`` has an entry per token along ``axes``.

    NeedsSideInput if it is computed from values with an entry per token along one axis (a mask that is a graph input,
    for example), so that these can be gathered as the tokens are; TokenPin otherwise. Whether these entries reach
    ``axes`` is checked when the values are followed.
    """
    value, pin = context.node.inputs[index], context.pin(index, reason)
    if value is None or value in context.flow.axes or len(axes) != 1 or any(axes.values()):
        return pin
    token_count = context.call.shape(index)[next(iter(axes))]
    followed = {}
    for origin in side_input_origins(context, value):
        shape = context.facts.shape.get(origin) or ()
        token_axes = [axis for axis, size in enumerate(shape) if axis and size == token_count]
        if len(token_axes) == 1 and shape[0] in (1, stream_batch_size(context)) and origin not in context.flow.origins:
            followed[origin] = TokenAxes({token_axes[0]: 0})
    return NeedsSideInput(pin, followed) if followed else pin


def side_input_origins(context: TokenNodeContext, value: ir.Value) -> list[ir.Value]:
    """The values that ``value`` is computed from, as far back as graph inputs or ancestors of the token stream.

    Only values that depend on the contents of graph inputs count.
    """
    data_dependent, stream_ancestors = context.graph.data_dependent, context.flow.stream_ancestors
    origins: list[ir.Value] = []
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        node = current.producer()
        if current not in data_dependent or current in context.flow.axes:
            continue
        if node is None or node in stream_ancestors:
            origins.append(current)
            continue
        unseen = [v for v in used_values(node) if v not in seen]
        seen.update(unseen)
        pending += unseen
    return origins
