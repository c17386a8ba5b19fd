"""Label propagation through grouped convolutions: one contraction per group, all of one weight shape."""

from __future__ import annotations

from dataclasses import replace

from snpc.ops import Letters, reshape_labels
from snpc.passes.propagation.contraction import contract_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext

GROUP_LETTER = "G"


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
