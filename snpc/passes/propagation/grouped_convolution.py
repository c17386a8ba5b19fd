"""Convolutions in groups: group by group a contraction of its own, of which all have the same weight shape."""

from __future__ import annotations

from dataclasses import replace

from snpc.ops.movement import reshape_labels
from snpc.ops.spec import Letters
from snpc.passes.propagation.contraction import contract_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext

GROUP_LETTER = "G"


def propagate_grouped_convolution(
    here: NodeContext, data: LabeledValue, weight: LabeledValue, letters: Letters, groups: int
) -> Factors:
    """One filter per channel is pointwise; otherwise every group keeps the same number of channels, and, of what is an
    axis of the weight that all groups share, the same ones."""
    if data.shape[1] == groups:
        return propagate_depthwise(here, data, weight, letters)
    spelled = Letters(
        letters.left.replace("I", GROUP_LETTER + "I"),
        prepend_group_letter(letters.right),
        letters.out.replace("C", GROUP_LETTER + "C"),
        letters.windowed,
    )  # fmt: skip
    parts = split_channel_axis(data, 1, groups), split_channel_axis(weight, 0, groups)
    factors = contract_labels(here, *parts, spelled)
    merged = here.call.out_shapes[0]
    split = (merged[0], groups, merged[1] // groups, *merged[2:])
    # What says only which group a channel is of adds nothing: no group goes as a whole.
    told = [f for f in factors if split[2] == 1 or varying_axes(f) != {1}]
    return tuple(reshape_labels(f, split, merged) for f in told)


def prepend_group_letter(right: str) -> str:
    """The first axis of a weight holds the groups, whether it is of outputs (Conv) or of inputs (ConvTranspose)."""
    return GROUP_LETTER + right


def split_channel_axis(carried: LabeledValue, axis: int, groups: int) -> LabeledValue:
    shape = (*carried.shape[:axis], groups, carried.shape[axis] // groups, *carried.shape[axis + 1 :])
    return replace(
        carried, shape=shape, factors=tuple(reshape_labels(f, carried.shape, shape) for f in carried.factors)
    )


def propagate_depthwise(here: NodeContext, data: LabeledValue, weight: LabeledValue, letters: Letters) -> Factors:
    """Each channel makes one channel, or several that go with it."""
    channels = here.call.out_shapes[0][1]
    times = channels // data.shape[1]
    shape = (data.shape[0], channels, *here.call.out_shapes[0][2:])
    view = (1, channels) + (1,) * (len(shape) - 2)
    for labels in data.factors:
        spatial = varying_axes(labels) - {0, 1}
        if spatial:
            here.pin(data, labels, "it is seen through a window", min(spatial))
    kept = tuple(f.repeat(times, 1) if f.shape[1] > 1 else f for f in data.factors if not varying_axes(f) - {0, 1})
    per_channel = depthwise_weight_labels(here, weight, letters, times, view)
    factors = unify_factors(
        here, [LabeledValue(data.name, shape, kept), LabeledValue(weight.name, view, per_channel, weight.constant)]
    )
    for labels in factors:
        here.trace.table.flag(labels, LabelFlag.NONLINEAR)
    return factors


def depthwise_weight_labels(
    here: NodeContext, weight: LabeledValue, letters: Letters, times: int, view: tuple[int, ...]
) -> Factors:
    """Labels of the weight's first axis, one for every output channel. Where that axis is of inputs (ConvTranspose),
    each of them makes ``times`` outputs, and the other axis tells which: all inputs have the same, so it stays."""
    inputs_first = letters.right[0] == "I"
    found = []
    for labels in weight.factors:
        if varying_axes(labels) == {0}:
            flat = labels.reshape(-1)
            found.append((flat.repeat(times) if inputs_first else flat).reshape(view))
        elif times > 1 and varying_axes(labels) == {1}:
            here.pin(weight, labels, "all groups have the same", 1)
    return tuple(found)
