"""What tokens meet that is not made of them: masks, tables of positions, weights of a mean without padding."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph.constant_values import is_constant_along
from snpc.graph.traversal import ancestor_nodes, data_dependent_values, dependent_values, used_values
from snpc.passes.token_analysis.state import NeedsSideInput, SideInput, TokenAxes, TokenNodeContext, TokenPin


def check_side_input(step: TokenNodeContext, index: int, axes: dict[int, int], pairs: bool) -> None:
    """What has entries for tokens, but is not made of them: a mask can be picked from as the tokens are, and what has
    the same entries everywhere needs one only."""
    value = step.node.inputs[index]
    assert value is not None
    even = is_constant_along(step.model, step.facts, value, tuple(axes))
    if depends_on_tokens(step, value) or not (even or can_gather_entries(step, index, axes)):
        positions = "every pair of positions" if pairs else "every position"
        raise side_input_error(
            step, index, axes, f"tokens meet {step.input_name(index)}, which has an entry for {positions}"
        )
    step.flow.side_inputs.append(SideInput(step.node, index, axes, even, step.input_name(index)))


def depends_on_tokens(step: TokenNodeContext, value: ir.Value) -> bool:
    """Not so of a mask over pairs of which one axis goes with the tokens already."""
    return value in step.flow.axes and value in dependent_values(step.model, [step.flow.stream])


def can_gather_entries(step: TokenNodeContext, index: int, axes: dict[int, int]) -> bool:
    """Can the entries for tokens that stay be picked from input ``index`` as it is? It has one for all of them along
    ``axes``: a mask that is computed, [batch or 1, .., queries, keys], or a table that is stored, [1, ..]."""
    value, shape = step.node.inputs[index], step.call.shape(index)
    assert value is not None
    if any(axes.values()) or min(axes) == 0:
        return False
    if value.const_value is not None:
        return len(shape) >= 3 and shape[0] == 1
    return len(shape) == 4 and shape[0] in (1, stream_batch_size(step))


def stream_batch_size(step: TokenNodeContext) -> int:
    return (step.facts.shape[step.flow.stream] or (0,))[0]


def side_input_error(step: TokenNodeContext, index: int, axes: dict[int, int], reason: str) -> TokenPin:
    """What to raise where input ``index`` has entries for tokens along ``axes``: Entered where it is made of values
    that have them along one axis (a mask that enters the model, say) and can go with the tokens, and so can what it is
    made of. That these come to lie along ``axes`` is seen when they are followed."""
    value, stuck = step.node.inputs[index], step.pin(index, reason)
    if value is None or value in step.flow.axes or len(axes) != 1 or any(axes.values()):
        return stuck
    many = step.call.shape(index)[next(iter(axes))]
    found = {}
    for source in side_input_origins(step, value):
        shape = step.facts.shape.get(source) or ()
        places = [axis for axis, size in enumerate(shape) if axis and size == many]
        if len(places) == 1 and shape[0] in (1, stream_batch_size(step)) and source not in step.flow.origins:
            found[source] = TokenAxes({places[0]: 0})
    return NeedsSideInput(stuck, found) if found else stuck


def side_input_origins(step: TokenNodeContext, value: ir.Value) -> list[ir.Value]:
    """The values with contents of inputs that ``value`` is made of, each the first one that the tokens' stream is not
    made of too, or what enters the model."""
    made, behind = data_dependent_values(step.model), ancestor_nodes(step.flow.stream)
    found: list[ir.Value] = []
    todo, seen = [value], {value}
    while todo:
        here = todo.pop()
        node = here.producer()
        if here not in made or here in step.flow.axes:
            continue
        if node is None or node in behind:
            found.append(here)
            continue
        new = [v for v in used_values(node) if v not in seen]
        seen.update(new)
        todo += new
    return found
