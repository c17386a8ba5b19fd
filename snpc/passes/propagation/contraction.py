"""Label propagation through contractions (sums of products), in Einstein notation.

Summed axes of both operands are unified. This is what makes queries and keys one group. A grouped convolution is one
contraction per group, all of one weight shape.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from snpc.ops import SHAPE_MISMATCH, SUMMED_OVER, Blocked, Labels, Letters, reshape_labels
from snpc.passes.propagation.copies import pin_copies
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import pin_partly_labeled, unify_factors
from snpc.passes.propagation.state import (
    Contraction,
    Factors,
    LabeledValue,
    NodeContext,
    cover_remaining_axes,
    labels_fit,
)

GROUP_LETTER = "G"


def contract_labels(
    context: NodeContext, left: LabeledValue, right: LabeledValue, letters: Letters, part: str = ""
) -> Factors:
    """Factors of the sum of products over the letters that do not occur in the output.

    ``part`` names a product inside a fused node. The contraction is recorded in the trace.
    """
    if not sizes_agree(left, right, letters):
        context.refuse([left, right], SHAPE_MISMATCH)
        return ()
    table = context.trace.table
    summed = set(letters.left) & set(letters.right) - set(letters.out)
    weights = which_are_weights(left, right)
    context.trace.contractions.append(Contraction(context.node, letters, left, right, any(weights), part))
    kernel = kernel_flag(left, right, letters)
    sides = ((left, letters.left, weights), (right, letters.right, weights[::-1]))
    out: list[tuple[LabeledValue, Labels]] = []
    covered: list[Labels] = []
    unify_summed_axes(context, left, right, letters, summed)
    for operand, operand_letters, (is_weight, other_is_weight) in sides:
        for labels in operand.factors:
            varying_letters = {operand_letters[k] for k in varying_axes(labels)}
            windowed = varying_letters & set(letters.windowed) if operand is left else set()
            dropped = varying_letters - summed - set(letters.out)
            if windowed:
                context.pin(operand, labels, "a spatial axis of a convolution", operand_letters.index(min(windowed)))
                continue
            if dropped:
                context.pin(operand, labels, SUMMED_OVER, operand_letters.index(min(dropped)))
                continue
            is_summed = bool(varying_letters & summed)
            if any(weights) or not is_stream(operand, left, right, is_summed):
                table.flag(labels, contraction_flags(varying_letters, letters, is_summed, is_weight, other_is_weight))
            if not any(weights) and not varying_letters & set(letters.left) & set(letters.right) & set(letters.out):
                table.products.append(np.unique(labels[labels >= 0]).astype(np.int64))
            if is_weight:
                table.flag(labels, kernel)
            rest = frozenset(k for k in varying_axes(labels) if operand_letters[k] in letters.out)
            if is_summed and not rest:
                continue
            remaining = cover_remaining_axes(context, labels, rest) if is_summed else labels
            moved = broadcast_to_letters(
                squeeze_to_letters(remaining, operand_letters, letters.out),
                output_letters(operand_letters, letters.out),
                letters.out,
            )
            if is_summed:
                same_axes = next((other for other in covered if other.shape == moved.shape), None)
                if same_axes is not None:
                    table.unify(same_axes, moved)
                    continue
                covered.append(moved)
            out.append((operand, moved))
    return unify_batch_axes(context, out, left, right, letters)


def kernel_flag(data: LabeledValue, weight: LabeledValue, letters: Letters) -> LabelFlag:
    """How a convolution's weight meets channels. Of one position it is a linear layer at each, unless there is but one
    (as in squeeze and excitation)."""
    if not letters.windowed:
        return LabelFlag(0)
    sizes = dict(zip(letters.right, weight.shape, strict=True))
    wide = any(size > 1 for letter, size in sizes.items() if letter not in letters.left + letters.out)
    positions = [size for letter, size in zip(letters.left, data.shape, strict=True) if letter in letters.windowed]
    return LabelFlag.CONVOLVED if wide or all(size == 1 for size in positions) else LabelFlag.POINTWISE


def contraction_flags(
    varying_letters: set[str], letters: Letters, is_summed: bool, is_weight: bool, other_is_weight: bool
) -> LabelFlag:
    """The flags of labels of one operand that vary on ``varying_letters``, of which some are summed or none."""
    if is_weight and is_summed:
        return LabelFlag.CONSUMED | LabelFlag.WEIGHT_INPUT
    if is_weight:
        return LabelFlag.PRODUCED
    if other_is_weight:
        return LabelFlag.CONSUMED if is_summed else LabelFlag(0)
    if is_summed:
        return LabelFlag.SCORED
    batched = bool(varying_letters) and varying_letters <= set(letters.left) & set(letters.right)
    return LabelFlag.PASSED_THROUGH | (LabelFlag.BATCHED if batched else LabelFlag(0))


def is_stream(operand: LabeledValue, left: LabeledValue, right: LabeledValue, is_summed: bool) -> bool:
    """Whether a product of activations takes a residual stream. Queries, keys and values are none: merging compares the
    tokens of a stream with each other, and multiplies it by their shares."""
    return operand.is_sum and (not is_summed or left.products == right.products)


def which_are_weights(left: LabeledValue, right: LabeledValue) -> tuple[bool, bool]:
    """Which operands (left, right) are weights. Of two constants the right one is, unless both are results of products:
    these are activations that do not depend on the input."""
    if left.constant and right.constant:
        both = left.projected and right.projected
        swapped = right.projected and not left.projected
        return swapped, not both and not swapped
    return left.constant and not left.projected, right.constant


def sizes_agree(left: LabeledValue, right: LabeledValue, letters: Letters) -> bool:
    """Whether operands have an axis per letter and equal sizes, or 1, where they share one; not in a damaged graph."""
    if (len(left.shape), len(right.shape)) != (len(letters.left), len(letters.right)):
        return False
    shared = [
        (left.shape[k], right.shape[letters.right.index(c)]) for k, c in enumerate(letters.left) if c in letters.right
    ]
    return all(a == b or 1 in (a, b) for a, b in shared) and labels_fit(left) and labels_fit(right)


def output_letters(operand_letters: str, out: str) -> str:
    """The letters of an operand that occur in the output."""
    return "".join(c for c in operand_letters if c in out)


def squeeze_to_letters(labels: Labels, operand_letters: str, out: str) -> Labels:
    """``labels`` without the axes of summed letters."""
    return labels.reshape([n for k, n in enumerate(labels.shape) if operand_letters[k] in out])


def unify_summed_axes(
    context: NodeContext, left: LabeledValue, right: LabeledValue, letters: Letters, summed: set[str]
) -> None:
    """Unify the labels of both operands along summed axes; pin them where only one operand has labels."""
    table = context.trace.table
    for letter in sorted(summed):
        i, j = letters.left.index(letter), letters.right.index(letter)
        left_factors = [f for f in left.factors if i in varying_axes(f)]
        right_factors = [f for f in right.factors if j in varying_axes(f)]
        for present, absent, axis, other_axis in ((left_factors, right, i, j), (right_factors, left, j, i)):
            counterpart = right_factors if present is left_factors else left_factors
            if present and not counterpart and absent.shape[other_axis] > 1:
                owner = left if present is left_factors else right
                for labels in present:
                    context.pin(owner, labels, f"contracted with {context.describe_unlabeled(absent)}", axis)
        for f in left_factors:
            for g in right_factors:
                a, b = transpose_to_letters(f, letters.left, letters), transpose_to_letters(g, letters.right, letters)
                if varying_axes(a) == varying_axes(b):
                    table.unify_or_cover(a, b)
                    pin_partly_labeled(context, left, a, b)
                elif varying_axes(a) < varying_axes(b):
                    table.cover(a, b, "aligned")
                elif varying_axes(b) < varying_axes(a):
                    table.cover(b, a, "aligned")
                else:
                    table.cover_in_common(a, b, "aligned")


def transpose_to_letters(labels: Labels, operand_letters: str, letters: Letters) -> Labels:
    """``labels`` with one axis per letter of both operands, in alphabetical order."""
    every = sorted(set(letters.left) | set(letters.right))
    return labels.transpose(sorted(range(len(operand_letters)), key=lambda k: every.index(operand_letters[k]))).reshape(
        [labels.shape[operand_letters.index(c)] if c in operand_letters else 1 for c in every]
    )


def unify_batch_axes(
    context: NodeContext,
    out: list[tuple[LabeledValue, Labels]],
    left: LabeledValue,
    right: LabeledValue,
    letters: Letters,
) -> Factors:
    """Output factors, related where both operands vary on the same output axes (heads of scores and of values). Copies
    go with the labels that they are multiplied with."""
    table = context.trace.table
    meant: list[Labels] = []
    shared_letters = {c for c in letters.out if c in letters.left and c in letters.right}
    kept: list[tuple[LabeledValue, Labels]] = []
    for operand, labels in out:
        batch_letters = {letters.out[k] for k in varying_axes(labels)} & shared_letters
        absorbed = False
        for other, existing in kept:
            if other is operand or not (varying_axes(labels) & varying_axes(existing)):
                continue
            if varying_axes(labels) == varying_axes(existing):
                table.unify(labels, existing)
                absorbed = True
            elif varying_axes(labels) < varying_axes(existing):
                table.cover(labels, existing, "batch")
            elif varying_axes(existing) < varying_axes(labels):
                table.cover(existing, labels, "batch")
            else:
                table.cover_in_common(labels, existing, "batch")
        partner, partner_letters = (right, letters.right) if operand is left else (left, letters.left)
        for letter in batch_letters:
            axis = partner_letters.index(letter)
            if partner.shape[axis] > 1 and not any(axis in varying_axes(f) for f in partner.factors):
                copies = next((c for c in partner.copies if varying_axes(c) == {axis}), None)
                if copies is not None and varying_axes(labels) == {letters.out.index(letter)}:
                    table.unify(labels.reshape(-1), copies.reshape(-1))
                    meant.append(copies)
                    continue
                pin_batch_axis(context, operand, labels, frozenset({letters.out.index(letter)}), partner)
                absorbed |= (
                    batch_letters == {letter} and len(varying_axes(labels)) == 1
                )  # pinned, so the factor is not needed any further
        if not absorbed:
            kept.append((operand, labels))
    for operand in (left, right):
        pin_copies(context, operand, [c for c in operand.copies if not any(c is other for other in meant)])
    return tuple(labels for _, labels in kept)


def pin_batch_axis(
    context: NodeContext, operand: LabeledValue, labels: Labels, axes: frozenset[int], partner: LabeledValue
) -> None:
    """Pin a batch axis on which ``partner`` has no labels: whole blocks stay, the width within blocks is free."""
    if varying_axes(labels) == axes:
        context.pin(operand, labels, f"a batch axis of a product with {context.describe_unlabeled(partner)}")
        return
    coarse = cover_remaining_axes(context, labels, axes)
    context.pin(partner, coarse, "no weight produces this axis", min(axes))


def unify_with_bias(context: NodeContext, factors: Factors, bias: LabeledValue, out: str, letters: str) -> Factors:
    """Factors after a bias is added, whose axes have ``letters``."""
    shape = context.call.out_shapes[0]
    if len(letters) != len(bias.shape):
        raise Blocked(0, SHAPE_MISMATCH)
    sizes = dict(zip(letters, bias.shape, strict=False))
    view = tuple(sizes.get(letter, 1) for letter in out)
    spread = LabeledValue(
        bias.name, view, tuple(broadcast_to_letters(f, letters, out) for f in bias.factors), bias.constant
    )
    return unify_factors(context, [LabeledValue(str(context.node.outputs[0].name), shape, factors), spread])


def broadcast_to_letters(labels: Labels, letters: str, out: str) -> Labels:
    """``labels`` with the axes ``letters``, transposed and extended to the axes ``out``."""
    order = [letters.index(c) for c in out if c in letters]
    moved = labels.transpose(order)
    return moved.reshape([moved.shape[[c for c in out if c in letters].index(c)] if c in letters else 1 for c in out])


# -- grouped convolutions ----------------------------------------------------------------------------------------------


def propagate_grouped_convolution(
    context: NodeContext, data: LabeledValue, weight: LabeledValue, letters: Letters, groups: int
) -> Factors:
    """Factors of the output of a convolution in ``groups`` groups.

    A depthwise convolution is element-wise per channel. Otherwise every group keeps the same number of channels, and
    along a weight axis that all groups share they keep the same ones.
    """
    if data.shape[1] == groups:
        return propagate_depthwise(context, data, weight, letters)
    spelled = Letters(
        letters.left.replace("I", GROUP_LETTER + "I"),
        prepend_group_letter(letters.right),
        letters.out.replace("C", GROUP_LETTER + "C"),
        letters.windowed,
    )  # fmt: skip
    parts = split_channel_axis(data, 1, groups), split_channel_axis(weight, 0, groups)
    factors = contract_labels(context, *parts, spelled)
    merged = context.call.out_shapes[0]
    split = (merged[0], groups, merged[1] // groups, *merged[2:])
    # A factor that only distinguishes groups is dropped: no group is removed as a whole.
    factors_within_groups = [f for f in factors if split[2] == 1 or varying_axes(f) != {1}]
    return tuple(reshape_labels(f, split, merged) for f in factors_within_groups)


def prepend_group_letter(right: str) -> str:
    """Letters of the weight with the group axis in front: its first axis holds the groups in Conv and ConvTranspose."""
    return GROUP_LETTER + right


def split_channel_axis(operand: LabeledValue, axis: int, groups: int) -> LabeledValue:
    """``operand`` with ``axis`` split into [groups, channels per group]."""
    shape = (*operand.shape[:axis], groups, operand.shape[axis] // groups, *operand.shape[axis + 1 :])
    return replace(
        operand, shape=shape, factors=tuple(reshape_labels(f, operand.shape, shape) for f in operand.factors)
    )


def propagate_depthwise(context: NodeContext, data: LabeledValue, weight: LabeledValue, letters: Letters) -> Factors:
    """Factors of a depthwise convolution: each input channel has one output channel, or several that go with it."""
    channels = context.call.out_shapes[0][1]
    repeats = channels // data.shape[1]
    shape = (data.shape[0], channels, *context.call.out_shapes[0][2:])
    view = (1, channels) + (1,) * (len(shape) - 2)
    for labels in data.factors:
        spatial = varying_axes(labels) - {0, 1}
        if spatial:
            context.pin(data, labels, "a spatial axis of a convolution", min(spatial))
    kept = tuple(f.repeat(repeats, 1) if f.shape[1] > 1 else f for f in data.factors if not varying_axes(f) - {0, 1})
    per_channel = depthwise_weight_labels(context, weight, letters, repeats, view)
    factors = unify_factors(
        context, [LabeledValue(data.name, shape, kept), LabeledValue(weight.name, view, per_channel, weight.constant)]
    )
    for labels in factors:
        context.trace.table.flag(labels, LabelFlag.NONLINEAR | LabelFlag.DEPTHWISE)
    return factors


def depthwise_weight_labels(
    context: NodeContext, weight: LabeledValue, letters: Letters, repeats: int, view: tuple[int, ...]
) -> Factors:
    """Labels of the weight's first axis, one per output channel.

    In ConvTranspose that axis holds input channels, each with ``repeats`` outputs. The second axis then distinguishes
    these outputs, and all input channels share it, so it is pinned.
    """
    inputs_first = letters.right[0] == "I"
    factors = []
    for labels in weight.factors:
        if varying_axes(labels) == {0}:
            flat = labels.reshape(-1)
            factors.append((flat.repeat(repeats) if inputs_first else flat).reshape(view))
        elif repeats > 1 and varying_axes(labels) == {1}:
            context.pin(weight, labels, "shared by all groups of the convolution", 1)
    return tuple(factors)
