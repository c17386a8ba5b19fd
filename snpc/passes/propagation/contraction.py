"""Sums of products: the algebra of labels under contractions. That Q and K belong together is said here, once."""

from __future__ import annotations

from snpc.ops.spec import SHAPE_MISMATCH, SUMMED_OVER, Blocked, Labels, Letters
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import pin_partly_labeled, unify_factors
from snpc.passes.propagation.state import Contraction, Factors, LabeledValue, NodeContext, cover_remaining_axes


def contract_labels(
    here: NodeContext, left: LabeledValue, right: LabeledValue, letters: Letters, part: str = ""
) -> Factors:
    """Sum over the letters that do not reach the output. ``part`` names the step of a fused node."""
    book = here.trace.table
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    weights = which_are_weights(left, right)
    constant = any(weights)
    here.trace.contractions.append(Contraction(here.node, letters, left, right, constant, part))
    sides = ((left, letters.left, weights), (right, letters.right, weights[::-1]))
    out: list[tuple[LabeledValue, Labels]] = []
    covered: list[Labels] = []
    unify_summed_axes(here, left, right, letters, summed)
    for mine, my_letters, (is_weight, other_is) in sides:
        for labels in mine.factors:
            on = {my_letters[k] for k in varying_axes(labels)}
            windowed = on & set(letters.windowed) if mine is left else set()
            if windowed:
                here.pin(mine, labels, "it is seen through a window", my_letters.index(min(windowed)))
                continue
            if on - summed - set(letters.out):
                here.pin(mine, labels, SUMMED_OVER, my_letters.index(min(on - summed - set(letters.out))))
                continue
            if is_weight:
                book.flag(labels, LabelFlag.CONSUMED | LabelFlag.WEIGHT_INPUT if on & summed else LabelFlag.PRODUCED)
                if not on & summed and letters.windowed:
                    book.flag(labels, LabelFlag.CONVOLVED)
            elif other_is and on & summed:
                book.flag(labels, LabelFlag.CONSUMED)
            elif not constant:
                batched = (
                    LabelFlag.BATCHED
                    if on and on <= set(letters.left) & set(letters.right)
                    else LabelFlag.PASSED_THROUGH
                )
                book.flag(labels, LabelFlag.SCORED if on & summed else batched | LabelFlag.PASSED_THROUGH)
            rest = frozenset(k for k in varying_axes(labels) if my_letters[k] in letters.out)
            if on & summed:
                if not rest:
                    continue
                labels = cover_remaining_axes(here, labels, rest)
                moved = broadcast_to_letters(
                    squeeze_to_letters(labels, my_letters, letters.out),
                    output_letters(my_letters, letters.out),
                    letters.out,
                )
                if any(m.shape == moved.shape for m in covered):
                    book.unify(next(m for m in covered if m.shape == moved.shape), moved)
                    continue
                covered.append(moved)
            else:
                moved = broadcast_to_letters(
                    squeeze_to_letters(labels, my_letters, letters.out),
                    output_letters(my_letters, letters.out),
                    letters.out,
                )
            out.append((mine, moved))
    return unify_batch_axes(here, out, left, right, letters)


def which_are_weights(left: LabeledValue, right: LabeledValue) -> tuple[bool, bool]:
    """Which operand of a product is the weight. Of two constants it is the right one, unless products made both: then
    these are activations that happen to be the same on every run."""
    if left.constant and right.constant:
        both = left.projected and right.projected
        swapped = right.projected and not left.projected
        return swapped, not both and not swapped
    return left.constant and not left.projected, right.constant


def output_letters(mine: str, out: str) -> str:
    return "".join(c for c in mine if c in out)


def squeeze_to_letters(labels: Labels, mine: str, out: str) -> Labels:
    return labels.reshape([n for k, n in enumerate(labels.shape) if mine[k] in out])


def unify_summed_axes(
    here: NodeContext, left: LabeledValue, right: LabeledValue, letters: Letters, summed: set[str]
) -> None:
    """Labels on both sides of a sum are one unit; labels on one side only are pinned."""
    book = here.trace.table
    for letter in sorted(summed):
        i, j = letters.left.index(letter), letters.right.index(letter)
        mine = [f for f in left.factors if i in varying_axes(f)]
        theirs = [f for f in right.factors if j in varying_axes(f)]
        for present, absent, axis, other_axis in ((mine, right, i, j), (theirs, left, j, i)):
            counterpart = theirs if present is mine else mine
            if present and not counterpart and absent.shape[other_axis] > 1:
                owner = left if present is mine else right
                for labels in present:
                    here.pin(owner, labels, f"it is summed against {here.describe_unlabeled(absent)}", axis)
        for f in mine:
            for g in theirs:
                a, b = transpose_to_letters(f, letters.left, letters), transpose_to_letters(g, letters.right, letters)
                if varying_axes(a) == varying_axes(b):
                    book.unify_or_cover(a, b)
                    pin_partly_labeled(here, left, a, b)
                elif varying_axes(a) < varying_axes(b):
                    book.cover(a, b, "meet")
                elif varying_axes(b) < varying_axes(a):
                    book.cover(b, a, "meet")
                else:
                    book.cover_in_common(a, b, "meet")


def transpose_to_letters(labels: Labels, mine: str, letters: Letters) -> Labels:
    every = sorted(set(letters.left) | set(letters.right))
    return labels.transpose(sorted(range(len(mine)), key=lambda k: every.index(mine[k]))).reshape(
        [labels.shape[mine.index(c)] if c in mine else 1 for c in every]
    )


def unify_batch_axes(
    here: NodeContext, out: list[tuple[LabeledValue, Labels]], left: LabeledValue, right: LabeledValue, letters: Letters
) -> Factors:
    """Factors of both operands that share output axes: heads of the scores over heads of the values."""
    book = here.trace.table
    batch = {c for c in letters.out if c in letters.left and c in letters.right}
    kept: list[tuple[LabeledValue, Labels]] = []
    for mine, labels in out:
        on = {letters.out[k] for k in varying_axes(labels)} & batch
        absorbed = False
        for other, existing in kept:
            if other is mine or not (varying_axes(labels) & varying_axes(existing)):
                continue
            if varying_axes(labels) == varying_axes(existing):
                book.unify(labels, existing)
                absorbed = True
            elif varying_axes(labels) < varying_axes(existing):
                book.cover(labels, existing, "batch")
            elif varying_axes(existing) < varying_axes(labels):
                book.cover(existing, labels, "batch")
            else:
                book.cover_in_common(labels, existing, "batch")
        partner, partner_letters = (right, letters.right) if mine is left else (left, letters.left)
        for letter in on:
            axis = partner_letters.index(letter)
            if partner.shape[axis] > 1 and not any(axis in varying_axes(f) for f in partner.factors):
                pin_batch_axis(here, mine, labels, frozenset({letters.out.index(letter)}), partner)
                absorbed |= on == {letter} and len(varying_axes(labels)) == 1  # pinned: nothing more to learn from it
        if not absorbed:
            kept.append((mine, labels))
    return tuple(labels for _, labels in kept)


def pin_batch_axis(
    here: NodeContext, carried: LabeledValue, labels: Labels, axes: frozenset[int], partner: LabeledValue
) -> None:
    """The other operand has this batch axis without labels: whole blocks stay, the width within them is free."""
    if varying_axes(labels) == axes:
        here.pin(carried, labels, f"it meets {here.describe_unlabeled(partner)}")
        return
    coarse = cover_remaining_axes(here, labels, axes)
    here.pin(partner, coarse, "no weight makes this axis", min(axes))


def unify_with_bias(here: NodeContext, factors: Factors, bias: LabeledValue, out: str, letters: str) -> Factors:
    shape = here.call.out_shapes[0]
    if len(letters) != len(bias.shape):
        raise Blocked(0, SHAPE_MISMATCH)
    sizes = dict(zip(letters, bias.shape, strict=False))
    view = tuple(sizes.get(letter, 1) for letter in out)
    spread = LabeledValue(
        bias.name, view, tuple(broadcast_to_letters(f, letters, out) for f in bias.factors), bias.constant
    )
    return unify_factors(here, [LabeledValue(str(here.node.outputs[0].name), shape, factors), spread])


def broadcast_to_letters(labels: Labels, letters: str, out: str) -> Labels:
    order = [letters.index(c) for c in out if c in letters]
    moved = labels.transpose(order)
    return moved.reshape([moved.shape[[c for c in out if c in letters].index(c)] if c in letters else 1 for c in out])
