"""Provenance by execution: every axis of every float constant gets labels, and the graph is run on the labels.

What each operator does comes from the table (``snpc.ops``); the algebra of labels is in ``meet`` (pointwise) and
``contract`` (sums of products). No attention pattern is known here: that Q and K belong together is simply what a
contraction of two activations says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.ops import lookup
from snpc.ops.attention import form, head_counts, packed_sizes
from snpc.ops.contraction import matmul_letters
from snpc.ops.opaque import SUBGRAPH
from snpc.ops.pointwise import SUMMED
from snpc.ops.movement import compress, concat_axis, regroup
from snpc.ops.spec import Blocked, Call, Labels, Letters, OpSpec, Shape
from snpc.passes.labels import Book, Flag, varying
from snpc.passes.shapes import Facts, is_float, opset, subgraphs

Factors = tuple[Labels, ...]


@dataclass(frozen=True)
class Carried:
    """What the trace knows of one value: its shape, the labels on it, and whether it is made of constants only."""

    name: str
    shape: Shape
    factors: Factors = ()
    constant: bool = False


@dataclass(frozen=True)
class Contraction:
    """One sum of products, as the cost, the scale and the probes need it."""

    node: ir.Node
    letters: Letters
    left: Carried
    right: Carried
    constant: bool
    part: str = ""


@dataclass
class Trace:
    """Labels of every value of the main graph, and the book of what they mean."""

    book: Book = field(default_factory=Book)
    values: dict[ir.Value, Carried] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    extra: dict[tuple[ir.Node, str], Carried] = field(default_factory=dict)


@dataclass(frozen=True)
class Here:
    """The node that is being traced, for pins."""

    node: ir.Node
    call: Call
    spec: OpSpec
    trace: Trace

    @property
    def operator(self) -> str:
        return f"{self.node.op_type} {self.node.name}"

    def pin(self, carried: Carried, labels: Labels, reason: str, axis: int | None = None, norm: bool = False) -> None:
        axes = sorted(varying(labels)) or [0]
        at = axes[0] if axis is None else axis
        size = carried.shape[at] if at < len(carried.shape) else 1
        self.trace.book.pin(labels, carried.name, at, size, reason, self.operator, "norm" if norm else "hard")

    def pin_all(self, inputs: Sequence[Carried | None], reason: str) -> None:
        for carried in inputs:
            for labels in carried.factors if carried else ():
                self.pin(carried, labels, reason)  # type: ignore[arg-type]


def trace_model(model: ir.Model, facts: Facts) -> Trace:
    """Run the labels through the main graph of a canonical model."""
    trace = Trace()
    for value in model.graph.inputs:
        if not value.is_initializer():
            enter_input(trace, value, facts)
    for value in model.graph.initializers.values():
        enter_constant(trace, value, facts)
    for node in model.graph:
        step(trace, model, facts, node)
    for value in model.graph.outputs:
        carried = trace.values.get(value)
        for labels in carried.factors if carried else ():
            axis = min(varying(labels), default=0)
            trace.book.pin(labels, str(value.name), axis, carried.shape[axis], "it is a graph output",  # type: ignore[union-attr]
                           f"output {value.name}")
    return trace


def enter_input(trace: Trace, value: ir.Value, facts: Facts) -> None:
    shape = facts.shape.get(value)
    if shape is not None:
        trace.values[value] = Carried(str(value.name), shape)


def enter_constant(trace: Trace, value: ir.Value, facts: Facts) -> None:
    shape = facts.shape.get(value)
    if shape is None:
        return
    factors: list[Labels] = []
    if is_float(facts.dtype.get(value)) and not value.is_graph_output():
        for axis, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[axis] = size
                factors.append(trace.book.axis_labels(value, axis, size).reshape(view))
    trace.values[value] = Carried(str(value.name), shape, tuple(factors), constant=True)


def step(trace: Trace, model: ir.Model, facts: Facts, node: ir.Node) -> None:
    version = opset(model, node.domain)
    here = Here(node, facts.call(node, version), lookup(node.domain, node.op_type), trace)
    inputs = [None if v is None else trace.values.get(v) for v in node.inputs]
    missing = [v for v, c in zip(node.inputs, inputs, strict=True) if v is not None and c is None]
    known = all(facts.shape.get(v) is not None for v in node.outputs[:1])
    if subgraphs(node):
        captured = [trace.values.get(v) for v in outer_values(node)]
        here.pin_all([*inputs, *captured], SUBGRAPH)
        outputs: list[Factors] = []
    elif missing or not known:
        what = str(missing[0].name) if missing else str(node.outputs[0].name)
        here.pin_all(inputs, here.spec.reason or f"the shape of {what} cannot be worked out")
        outputs = []
    else:
        outputs = RULES[here.spec.kind](here, inputs)
    constant = bool(inputs) and all(
        v is None or v in facts.value or (c is not None and c.constant) for v, c in zip(node.inputs, inputs, strict=True)
    )
    for index, value in enumerate(node.outputs):
        shape = facts.shape.get(value)
        if shape is None:
            continue
        factors = outputs[index] if index < len(outputs) else ()
        usable = independent(tuple(f for f in factors if f.ndim == len(shape) and (f >= 0).any()))
        trace.values[value] = Carried(str(value.name), shape, usable, constant)


def independent(factors: Factors) -> Factors:
    """Without the factors that a finer one on the same axes determines (heads beneath heads x width, flattened).

    Nothing is lost: what the coarser labels cover was written down where the two first met.
    """
    kept: list[Labels] = []
    for labels in sorted(factors, key=lambda f: -len(np.unique(f))):
        if not any(varying(labels) == varying(fine) and determines(fine, labels) for fine in kept):
            kept.append(labels)
    return tuple(kept)


def determines(fine: Labels, coarse: Labels) -> bool:
    a, b = np.broadcast_arrays(fine, coarse)
    return len(np.unique(np.stack([a.reshape(-1), b.reshape(-1)]), axis=1).T) == len(np.unique(a))


def outer_values(node: ir.Node) -> list[ir.Value]:
    """Values of the enclosing graph that a node's subgraphs read."""
    graphs = [a.value for a in node.attributes.values() if isinstance(a, ir.Attr) and a.type == ir.AttributeType.GRAPH]
    inner = [n for g in graphs for n in ir.traversal.RecursiveGraphIterator(g)]
    made = {v for n in inner for v in n.outputs} | {v for g in graphs for v in (*g.inputs, *g.initializers.values())}
    read = {v for n in inner for v in n.inputs if v is not None} | {v for g in graphs for v in g.outputs}
    return [v for v in read if v not in made]


# -- one rule per kind -----------------------------------------------------------------------------------------------


def opaque(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    here.pin_all(inputs, here.spec.reason)
    return []


def shape_only(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    return []


def movement(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = inputs[0]
    assert data is not None and here.spec.move is not None
    outputs: list[list[Labels]] = [[] for _ in here.call.outs]
    for labels in data.factors:
        try:
            moved = here.spec.move(here.call, labels)
        except Blocked as block:
            here.pin(data, labels, block.reason, block.axis)
            continue
        for out, part in zip(outputs, moved, strict=False):
            out.append(part)
    if data.constant and any(c is not None and v is None for c, v in zip(inputs[1:], here.call.values[1:], strict=True)):
        for labels in outputs[0]:
            here.trace.book.flag(labels, Flag.PRODUCED)
    return [tuple(out) for out in outputs]


def concat(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """Lay the parts end to end. On other axes the parts must agree, so what meets there is joined."""
    axis = concat_axis(here.call)
    parts = [c for c in inputs if c is not None and c.shape[axis] > 0]
    along: list[Labels] = []
    across: dict[frozenset[int], Labels] = {}
    patterns = list(dict.fromkeys(varying(f) - {axis} for c in parts for f in c.factors))
    for pattern in patterns:
        mine = [[f for f in c.factors if varying(f) - {axis} == pattern] for c in parts]
        if any(axis in varying(f) for fs in mine for f in fs) or not pattern:
            along += [lay(here, parts, mine, axis, pattern)]
            continue
        for carried, fs in zip(parts, mine, strict=True):
            if not fs and all(carried.shape[k] > 1 for k in pattern):
                for other, gs in zip(parts, mine, strict=True):
                    for labels in gs:
                        here.pin(other, labels, f"it is laid beside {carried.name}, which no weight makes")
            for labels in fs:
                if pattern in across:
                    here.trace.book.join(across[pattern], labels)
                else:
                    across[pattern] = labels
    return [tuple(f for f in (*along, *across.values()) if f.size)]


def lay(here: Here, parts: Sequence[Carried], mine: Sequence[Sequence[Labels]], axis: int,
        pattern: frozenset[int]) -> Labels:
    rows = []
    shape = [max((f.shape[k] for fs in mine for f in fs), default=1) if k in pattern else 1
             for k in range(len(parts[0].shape))]
    for carried, fs in zip(parts, mine, strict=True):
        target = [*shape]
        target[axis] = carried.shape[axis]
        if not fs:
            rows.append(np.full(target, -1, np.int32))
            continue
        for extra in fs[1:]:
            here.trace.book.join(fs[0], extra)
        rows.append(np.broadcast_to(fs[0], target))
    return compress(np.concatenate(rows, axis))


def align(labels: Labels, rank: int) -> Labels:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def pointwise(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    rank = len(here.call.outs[0])
    parts = [
        Carried(c.name, (1,) * (rank - len(c.shape)) + c.shape, tuple(align(f, rank) for f in c.factors), c.constant)
        for c in inputs
        if c is not None and len(c.shape) <= rank
    ]
    factors = meet(here, parts)
    note_effect(here, parts, factors)
    return [factors] * len(here.call.outs)


def note_effect(here: Here, parts: Sequence[Carried], factors: Factors) -> None:
    book = here.trace.book
    effect = here.spec.effect
    active = [c for c in parts if c.factors and not c.constant]
    flag = Flag(0)
    if effect == "nonlinear":
        flag |= Flag.CURVED
    several = len(active) > 1 and any(not same_labels(active[0], c) for c in active[1:])
    if effect == "add" and several:
        flag |= Flag.ADDED
    if effect == "scale" and several:
        flag |= Flag.GATED
    if effect == "scale" and any(c.constant and c.factors for c in parts):
        flag |= Flag.SCALED
    if flag:
        for labels in factors:
            book.flag(labels, flag)


def same_labels(left: Carried, right: Carried) -> bool:
    """Two tensors made of one (x and its cube, in a polynomial activation) carry the same labels."""
    mine = {labels.tobytes() for labels in left.factors}
    return any(labels.tobytes() in mine for labels in right.factors)


def meet(here: Here, parts: Sequence[Carried]) -> Factors:
    """Factors of several tensors at the same positions: same axes join, coarser covers finer, the rest is pinned."""
    book = here.trace.book
    kept: list[tuple[int, Labels]] = []
    for index, carried in enumerate(parts):
        for labels in carried.factors:
            stranger = unlabelled_partner(parts, index, labels)
            if stranger is not None:
                here.pin(carried, labels, f"it meets {stranger.name}, which no weight makes")
                if carried.constant:
                    continue
            joined = False
            for k, (owner, other) in enumerate(kept):
                if owner == index or not (varying(labels) & varying(other)):
                    continue
                if varying(labels) == varying(other):
                    book.match(labels, other)
                    pin_half_labelled(here, carried, labels, other)
                    if parts[owner].constant and not carried.constant:
                        kept[k] = (owner, labels)
                    joined = True
                elif varying(labels) < varying(other):
                    book.cover(labels, other, "meet")
                elif varying(labels) > varying(other):
                    book.cover(other, labels, "meet")
                else:
                    book.share(labels, other, "meet")
            if not joined:
                kept.append((index, labels))
    return tuple(labels for _, labels in kept)


def unlabelled_partner(parts: Sequence[Carried], index: int, labels: Labels) -> Carried | None:
    """Another tensor that has entries along an axis of ``labels`` but no labels of its own there."""
    for other, carried in enumerate(parts):
        if other == index:
            continue
        for axis in varying(labels):
            if carried.shape[axis] > 1 and not any(axis in varying(f) for f in carried.factors):
                return carried
    return None


def pin_half_labelled(here: Here, carried: Carried, left: Labels, right: Labels) -> None:
    a, b = np.broadcast_arrays(left, right)
    odd = (a >= 0) != (b >= 0)
    if odd.any():
        here.pin(carried, np.concatenate([a[odd], b[odd]]), "it meets positions that no weight makes")


def normalise(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = here.spec.data or (0,)
    first = inputs[data[0]]
    assert first is not None
    rank = len(first.shape)
    per_axis = [(abs(k), k < 0) for k in here.spec.per_axis]
    parts = [inputs[k] for k in data] + [
        channelled(inputs[k], rank, at_channel) for k, at_channel in per_axis if k < len(inputs)
    ]
    present = [
        Carried(c.name, (1,) * (rank - len(c.shape)) + c.shape, tuple(align(f, rank) for f in c.factors), c.constant)
        for c in parts
        if c is not None
    ]
    for c in present[len(data) :]:
        for labels in c.factors:
            here.trace.book.flag(labels, Flag.NORMED)
    factors = meet(here, present)
    axes = here.spec.axes(here.call) if here.spec.axes else ()
    for labels in factors:
        crossed = varying(labels) & set(axes)
        if crossed:
            norm = not here.spec.reason
            reason = "its statistics are taken over this axis" if norm else here.spec.reason
            axis = min(crossed)
            here.trace.book.pin(labels, first.name, axis, first.shape[axis], reason, here.operator,
                                "norm" if norm else "hard")
        here.trace.book.flag(labels, Flag.CURVED)
    return [factors] + [()] * (len(here.call.outs) - 1) if len(here.call.outs) > 1 else [factors]


def channelled(carried: Carried | None, rank: int, at_channel: bool) -> Carried | None:
    """A vector per channel (axis 1) laid out so that it broadcasts."""
    if carried is None or not at_channel:
        return carried
    shape = (1, carried.shape[0]) + (1,) * (rank - 2)
    return Carried(carried.name, shape, tuple(f.reshape(shape) for f in carried.factors if f.size > 1),
                   carried.constant)


def reduce(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    data = inputs[0]
    assert data is not None and here.spec.axes is not None
    axes = set(here.spec.axes(here.call))
    rank = len(data.shape)
    dropped = axes if len(here.call.outs[0]) < rank else set()
    out: list[Labels] = []
    for labels in data.factors:
        crossed = varying(labels) & axes
        if crossed:
            here.pin(data, labels, here.spec.reason, min(crossed), norm=True)
            rest = varying(labels) - axes
            if not rest:
                continue
            labels = cover_rest(here, labels, rest)
        here.trace.book.flag(labels, Flag.CURVED)
        out.append(labels.reshape([n for k, n in enumerate(labels.shape) if k not in dropped]))
    return [tuple(out)]


def cover_rest(here: Here, labels: Labels, rest: frozenset[int]) -> Labels:
    """Fresh labels for what remains of ``labels`` when the other axes are summed: one per head, say."""
    shape = [n if k in rest else 1 for k, n in enumerate(labels.shape)]
    coarse = here.trace.book.fresh(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    here.trace.book.cover(coarse, labels, "batch")
    return coarse


def contraction(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    spec = here.spec
    left, right = inputs[spec.operands[0]], inputs[spec.operands[1]]
    assert spec.letters is not None
    if left is None or right is None:
        return opaque_because(here, inputs, "a product of other than two tensors")
    try:
        letters = spec.letters(here.call)
    except Blocked as block:
        return opaque_because(here, inputs, block.reason)
    if int(here.call.attrs.get("group", 1)) > 1:
        factors = depthwise(here, left, right)
        if factors is None:
            return opaque_because(here, inputs, "a convolution in groups")
    else:
        factors = contract(here, left, right, letters)
    bias = inputs[spec.bias] if spec.bias is not None and spec.bias < len(inputs) else None
    if bias is not None and spec.bias_letters is not None and bias.factors:
        factors = add_bias(here, factors, bias, letters.out, spec.bias_letters(here.call))
    if spec.curved:
        for labels in factors:
            here.trace.book.flag(labels, Flag.CURVED)
    return [factors]


def opaque_because(here: Here, inputs: Sequence[Carried | None], reason: str) -> list[Factors]:
    here.pin_all(inputs, reason)
    return []


def add_bias(here: Here, factors: Factors, bias: Carried, out: str, letters: str) -> Factors:
    shape = here.call.outs[0]
    sizes = dict(zip(letters, bias.shape, strict=False))
    view = tuple(sizes.get(letter, 1) for letter in out)
    spread = Carried(bias.name, view, tuple(spread_letters(f, letters, out) for f in bias.factors), bias.constant)
    return meet(here, [Carried(str(here.node.outputs[0].name), shape, factors), spread])


def spread_letters(labels: Labels, letters: str, out: str) -> Labels:
    order = [letters.index(c) for c in out if c in letters]
    moved = labels.transpose(order)
    return moved.reshape([moved.shape[[c for c in out if c in letters].index(c)] if c in letters else 1 for c in out])


def depthwise(here: Here, data: Carried, weight: Carried) -> Factors | None:
    """One filter per channel: the weight's first axis follows the data's channels."""
    groups = int(here.call.attrs.get("group", 1))
    if data.shape[1] != groups or weight.shape[0] != groups or not weight.constant:
        return None
    rank = len(data.shape)
    channel = (1, groups) + (1,) * (rank - 2)
    per_channel = tuple(f.reshape(channel) for f in weight.factors if varying(f) == {0})
    for labels in data.factors:
        spatial = varying(labels) - {0, 1}
        if spatial:
            here.pin(data, labels, "it is seen through a window", min(spatial))
    kept = tuple(f for f in data.factors if not varying(f) - {0, 1})
    factors = meet(here, [Carried(data.name, data.shape, kept), Carried(weight.name, channel, per_channel, True)])
    for labels in factors:
        here.trace.book.flag(labels, Flag.CURVED)
    return factors


def contract(here: Here, left: Carried, right: Carried, letters: Letters, part: str = "") -> Factors:
    """Sum over the letters that do not reach the output. ``part`` names the step of a fused node."""
    book = here.trace.book
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    constant = left.constant or right.constant
    here.trace.contractions.append(Contraction(here.node, letters, left, right, constant, part))
    sides = ((left, letters.left, right, letters.right), (right, letters.right, left, letters.left))
    out: list[tuple[Carried, Labels]] = []
    covered: list[Labels] = []
    join_summed(here, left, right, letters, summed)
    for mine, my_letters, other, other_letters in sides:
        for labels in mine.factors:
            on = {my_letters[k] for k in varying(labels)}
            windowed = on & set(letters.windowed) if mine is left else set()
            if windowed:
                here.pin(mine, labels, "it is seen through a window", my_letters.index(min(windowed)))
                continue
            if on - summed - set(letters.out):
                here.pin(mine, labels, SUMMED, my_letters.index(min(on - summed - set(letters.out))))
                continue
            if mine.constant and not other.constant:
                book.flag(labels, Flag.CONSUMED | Flag.READS if on & summed else Flag.PRODUCED)
                if not on & summed and letters.windowed:
                    book.flag(labels, Flag.CONVOLVED)
            elif other.constant and on & summed:
                book.flag(labels, Flag.CONSUMED)
            elif not constant:
                book.flag(labels, Flag.SCORED if on & summed else Flag.CARRIED)
            rest = frozenset(k for k in varying(labels) if my_letters[k] in letters.out)
            if on & summed:
                if not rest:
                    continue
                labels = cover_rest(here, labels, rest)
                moved = spread_letters(squeeze_to(labels, my_letters, letters.out), kept_letters(my_letters, letters.out),
                                       letters.out)
                if any(m.shape == moved.shape for m in covered):
                    book.join(next(m for m in covered if m.shape == moved.shape), moved)
                    continue
                covered.append(moved)
            else:
                moved = spread_letters(squeeze_to(labels, my_letters, letters.out), kept_letters(my_letters, letters.out),
                                       letters.out)
            out.append((mine, moved))
    return join_batches(here, out, left, right, letters)


def kept_letters(mine: str, out: str) -> str:
    return "".join(c for c in mine if c in out)


def squeeze_to(labels: Labels, mine: str, out: str) -> Labels:
    return labels.reshape([n for k, n in enumerate(labels.shape) if mine[k] in out])


def join_summed(here: Here, left: Carried, right: Carried, letters: Letters, summed: set[str]) -> None:
    """Labels on both sides of a sum are one unit; labels on one side only are pinned."""
    book = here.trace.book
    for letter in sorted(summed):
        i, j = letters.left.index(letter), letters.right.index(letter)
        mine = [f for f in left.factors if i in varying(f)]
        theirs = [f for f in right.factors if j in varying(f)]
        for present, absent, axis, other_axis in ((mine, right, i, j), (theirs, left, j, i)):
            counterpart = theirs if present is mine else mine
            if present and not counterpart and absent.shape[other_axis] > 1:
                owner = left if present is mine else right
                for labels in present:
                    here.pin(owner, labels, missing_partner(absent), axis)
        for f in mine:
            for g in theirs:
                a, b = by_letter(f, letters.left, letters), by_letter(g, letters.right, letters)
                if varying(a) == varying(b):
                    book.match(a, b)
                    pin_half_labelled(here, left, a, b)
                elif varying(a) < varying(b):
                    book.cover(a, b, "meet")
                elif varying(b) < varying(a):
                    book.cover(b, a, "meet")
                else:
                    book.share(a, b, "meet")


def missing_partner(carried: Carried) -> str:
    return f"it is summed against {carried.name}, which no float weight makes"


def by_letter(labels: Labels, mine: str, letters: Letters) -> Labels:
    every = sorted(set(letters.left) | set(letters.right))
    return labels.transpose(sorted(range(len(mine)), key=lambda k: every.index(mine[k]))).reshape(
        [labels.shape[mine.index(c)] if c in mine else 1 for c in every]
    )


def join_batches(here: Here, out: list[tuple[Carried, Labels]], left: Carried, right: Carried,
                 letters: Letters) -> Factors:
    """Factors of both operands that share output axes: heads of the scores over heads of the values."""
    book = here.trace.book
    batch = {c for c in letters.out if c in letters.left and c in letters.right}
    kept: list[tuple[Carried, Labels]] = []
    for mine, labels in out:
        on = {letters.out[k] for k in varying(labels)} & batch
        absorbed = False
        for other, existing in kept:
            if other is mine or not (varying(labels) & varying(existing)):
                continue
            if varying(labels) == varying(existing):
                book.join(labels, existing)
                absorbed = True
            elif varying(labels) < varying(existing):
                book.cover(labels, existing, "batch")
            elif varying(existing) < varying(labels):
                book.cover(existing, labels, "batch")
            else:
                book.share(labels, existing, "batch")
        partner, partner_letters = (right, letters.right) if mine is left else (left, letters.left)
        for letter in on:
            axis = partner_letters.index(letter)
            if partner.shape[axis] > 1 and not any(axis in varying(f) for f in partner.factors):
                pin_per_batch(here, mine, labels, frozenset({letters.out.index(letter)}), partner)
        if not absorbed:
            kept.append((mine, labels))
    return tuple(labels for _, labels in kept)


def pin_per_batch(here: Here, carried: Carried, labels: Labels, axes: frozenset[int], partner: Carried) -> None:
    """The other operand has this batch axis without labels: whole blocks stay, the width within them is free."""
    if varying(labels) == axes:
        here.pin(carried, labels, f"it meets {partner.name}, which no weight makes")
        return
    coarse = cover_rest(here, labels, axes)
    here.pin(partner, coarse, "no weight makes this axis", min(axes))


def attention(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """Scores, softmax, context, spelled out with the same rules as their separate nodes."""
    shape = form(here.node.domain, here.node.op_type)
    extra = [inputs[k] for k in shape.other_inputs if k < len(inputs)]
    if any(c is not None and c.factors for c in extra):
        here.pin_all(extra, "an input of a fused attention that snpc does not follow")
    past = [c for c in extra if c is not None and c.shape and len(c.shape) >= 3]
    if len([o for o in here.node.outputs if o.name and o.uses()]) > 1 or past:
        return opaque_because(here, inputs, "a fused attention that keeps keys and values of earlier steps")
    if shape.packed_weight is not None:
        query, key, value = packed_projection(here, inputs)
    else:
        given = [inputs[k] if k < len(inputs) else None for k in (shape.query, shape.key, shape.value)]
        if any(c is None for c in given):
            return opaque_because(here, inputs, "a fused attention with packed keys and values")
        query, key, value = given  # type: ignore[assignment]
        if shape.bias is not None and shape.bias < len(inputs) and inputs[shape.bias] is not None:
            query, key, value = add_packed_bias(here, [query, key, value], inputs[shape.bias])  # type: ignore[arg-type]
    heads, kv_heads = head_counts(here.call)
    if heads:
        query, key, value = (split_heads(c, n) for c, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    bias = inputs[shape.score_inputs[0]] if shape.score_inputs[0] < len(inputs) else None
    context = attend(here, query, key, value, bias)
    if heads:
        batch, _, length, width = context.shape
        merged = (batch, length, heads * width)
        moved = (batch, length, heads, width)
        return [tuple(regroup(f.transpose(0, 2, 1, 3), moved, merged) for f in context.factors)]
    return [context.factors]


def attend(here: Here, query: Carried, key: Carried, value: Carried, bias: Carried | None) -> Carried:
    product = matmul_letters(4, 4)
    flipped = Letters(product.left, product.right[:-2] + product.right[-1] + product.right[-2], product.out)
    scores_shape = (*query.shape[:3], key.shape[2])
    scores = Carried(f"{here.node.name}.scores", scores_shape, contract(here, query, key, flipped, "scores"))
    parts = [scores]
    if bias is not None:
        rank = 4
        parts.append(Carried(bias.name, (1,) * (rank - len(bias.shape)) + bias.shape,
                             tuple(align(f, rank) for f in bias.factors), bias.constant))
    factors = meet(here, parts)
    for labels in factors:
        if 3 in varying(labels):
            here.pin(scores, labels, SUMMED, 3)
    weights = Carried(f"{here.node.name}.weights", scores_shape, factors)
    context_shape = (*query.shape[:3], value.shape[3])
    for name, carried in (("query", query), ("key", key), ("value", value)):
        here.trace.extra[(here.node, name)] = carried
    return Carried(f"{here.node.name}.context", context_shape, contract(here, weights, value, product, "context"))


def split_heads(carried: Carried, heads: int) -> Carried:
    """[B,N,H*D] -> [B,H,N,D]."""
    if len(carried.shape) != 3:
        return carried
    batch, length, width = carried.shape
    shape = (batch, length, heads, width // heads)
    factors = tuple(regroup(f, carried.shape, shape).transpose(0, 2, 1, 3) for f in carried.factors)
    return Carried(carried.name, (batch, heads, length, width // heads), factors, carried.constant)


def repeat_heads(carried: Carried, times: int) -> Carried:
    shape = (carried.shape[0], carried.shape[1] * times, *carried.shape[2:])
    factors = tuple(f.repeat(times, 1) if f.shape[1] > 1 else f for f in carried.factors)
    return Carried(carried.name, shape, factors, carried.constant)


def packed_projection(here: Here, inputs: Sequence[Carried | None]) -> tuple[Carried, Carried, Carried]:
    """com.microsoft.Attention projects inside: x @ W + b, then Q, K and V are thirds of the columns."""
    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    assert data is not None and weight is not None
    shape = (*data.shape[:2], weight.shape[1])
    factors = contract(here, data, weight, matmul_letters(len(data.shape), 2), "projection")
    parts = [Carried(f"{here.node.name}.qkv", shape, factors)]
    if bias is not None:
        parts.append(Carried(bias.name, (1, 1, *bias.shape), tuple(align(f, 3) for f in bias.factors), bias.constant))
    return columns(here, meet(here, parts), shape, packed_sizes(here.call))


def add_packed_bias(here: Here, given: Sequence[Carried], bias: Carried) -> tuple[Carried, Carried, Carried]:
    sizes = tuple(c.shape[-1] for c in given)
    parts = columns(here, tuple(align(f, 3) for f in bias.factors), (1, 1, sum(sizes)), sizes)  # type: ignore[arg-type]
    q, k, v = (
        Carried(c.name, c.shape, meet(here, [c, Carried(bias.name, (1, 1, part.shape[-1]), part.factors, True)]))
        for c, part in zip(given, parts, strict=True)
    )
    return q, k, v


def columns(here: Here, factors: Factors, shape: Shape, sizes: tuple[int, int, int]) -> tuple[Carried, Carried, Carried]:
    ends = np.cumsum(sizes)[:2]
    parts = []
    for index, size in enumerate(sizes):
        mine = tuple(
            compress(np.split(f, ends, -1)[index]) if f.shape[-1] > 1 else f for f in factors
        )
        parts.append(Carried(f"{here.node.name}.{'qkv'[index]}", (*shape[:-1], size), mine))
    return parts[0], parts[1], parts[2]


RULES = {
    "movement": movement,
    "concat": concat,
    "pointwise": pointwise,
    "contraction": contraction,
    "normalise": normalise,
    "reduce": reduce,
    "attention": attention,
    "shape": shape_only,
    "opaque": opaque,
}
