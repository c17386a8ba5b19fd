"""What tokens meet that is not made of them: masks, tables of positions, weights of a mean without padding."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph.constant_values import is_even
from snpc.graph.traversal import behind_of, data_made, in_front_of, reads
from snpc.passes.token_analysis.state import Entered, Marks, Side, Step, Stuck


def beside(step: Step, index: int, axes: dict[int, int], pairs: bool) -> None:
    """What has entries for tokens, but is not made of them: a mask can be picked from as the tokens are, and what has
    the same entries everywhere needs one only."""
    value = step.node.inputs[index]
    assert value is not None
    even = is_even(step.model, step.facts, value, tuple(axes))
    if is_made_of_tokens(step, value) or not (even or is_picked_from(step, index, axes)):
        positions = "every pair of positions" if pairs else "every position"
        raise apart(step, index, axes, f"tokens meet {step.name(index)}, which has an entry for {positions}")
    step.flow.sides.append(Side(step.node, index, axes, even, step.name(index)))


def is_made_of_tokens(step: Step, value: ir.Value) -> bool:
    """Not so of a mask over pairs of which one axis goes with the tokens already."""
    return value in step.flow.marks and value in behind_of(step.model, [step.flow.stream])


def is_picked_from(step: Step, index: int, axes: dict[int, int]) -> bool:
    """Can the entries for tokens that stay be picked from input ``index`` as it is? It has one for all of them along
    ``axes``: a mask that is computed, [batch or 1, .., queries, keys], or a table that is stored, [1, ..]."""
    value, shape = step.node.inputs[index], step.call.shape(index)
    assert value is not None
    if any(axes.values()) or min(axes) == 0:
        return False
    if value.const_value is not None:
        return len(shape) >= 3 and shape[0] == 1
    return len(shape) == 4 and shape[0] in (1, batch_of(step))


def batch_of(step: Step) -> int:
    return (step.facts.shape[step.flow.stream] or (0,))[0]


def apart(step: Step, index: int, axes: dict[int, int], reason: str) -> Stuck:
    """What to raise where input ``index`` has entries for tokens along ``axes``: Entered where it is made of values
    that have them along one axis (a mask that enters the model, say) and can go with the tokens, and so can what it is
    made of. That these come to lie along ``axes`` is seen when they are followed."""
    value, stuck = step.node.inputs[index], step.stuck(index, reason)
    if value is None or value in step.flow.marks or len(axes) != 1 or any(axes.values()):
        return stuck
    many = step.call.shape(index)[next(iter(axes))]
    found = {}
    for source in entrances(step, value):
        shape = step.facts.shape.get(source) or ()
        places = [axis for axis, size in enumerate(shape) if axis and size == many]
        if len(places) == 1 and shape[0] in (1, batch_of(step)) and source not in step.flow.starts:
            found[source] = Marks({places[0]: 0})
    return Entered(stuck, found) if found else stuck


def entrances(step: Step, value: ir.Value) -> list[ir.Value]:
    """The values with contents of inputs that ``value`` is made of, each the first one that the tokens' stream is not
    made of too, or what enters the model."""
    made, behind = data_made(step.model), in_front_of(step.flow.stream)
    found: list[ir.Value] = []
    todo, seen = [value], {value}
    while todo:
        here = todo.pop()
        node = here.producer()
        if here not in made or here in step.flow.marks:
            continue
        if node is None or node in behind:
            found.append(here)
            continue
        new = [v for v in reads(node) if v not in seen]
        seen.update(new)
        todo += new
    return found
