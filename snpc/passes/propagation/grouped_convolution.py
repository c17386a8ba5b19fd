"""Convolutions in groups: group by group a contraction of its own, of which all have the same weight shape."""

from __future__ import annotations

from dataclasses import replace

from snpc.ops.movement import regroup
from snpc.ops.spec import Letters
from snpc.passes.propagation.contraction import contract
from snpc.passes.propagation.labels import Flag, varying
from snpc.passes.propagation.pointwise import meet
from snpc.passes.propagation.state import Carried, Factors, Here

GROUP = "G"


def grouped(here: Here, data: Carried, weight: Carried, letters: Letters, groups: int) -> Factors:
    """One filter per channel is pointwise; otherwise every group keeps the same number of channels, and, of what is an
    axis of the weight that all groups share, the same ones."""
    if data.shape[1] == groups:
        return depthwise(here, data, weight, letters)
    spelled = Letters(
        letters.left.replace("I", GROUP + "I"), group_first(letters.right), letters.out.replace("C", GROUP + "C"),
        letters.windowed,
    )  # fmt: skip
    parts = split_channels(data, 1, groups), split_channels(weight, 0, groups)
    factors = contract(here, *parts, spelled)
    merged = here.call.outs[0]
    split = (merged[0], groups, merged[1] // groups, *merged[2:])
    # What says only which group a channel is of adds nothing: no group goes as a whole.
    told = [f for f in factors if split[2] == 1 or varying(f) != {1}]
    return tuple(regroup(f, split, merged) for f in told)


def group_first(right: str) -> str:
    """The first axis of a weight holds the groups, whether it is of outputs (Conv) or of inputs (ConvTranspose)."""
    return GROUP + right


def split_channels(carried: Carried, axis: int, groups: int) -> Carried:
    shape = (*carried.shape[:axis], groups, carried.shape[axis] // groups, *carried.shape[axis + 1 :])
    return replace(carried, shape=shape, factors=tuple(regroup(f, carried.shape, shape) for f in carried.factors))


def depthwise(here: Here, data: Carried, weight: Carried, letters: Letters) -> Factors:
    """Each channel makes one channel, or several that go with it."""
    channels = here.call.outs[0][1]
    times = channels // data.shape[1]
    shape = (data.shape[0], channels, *here.call.outs[0][2:])
    view = (1, channels) + (1,) * (len(shape) - 2)
    for labels in data.factors:
        spatial = varying(labels) - {0, 1}
        if spatial:
            here.pin(data, labels, "it is seen through a window", min(spatial))
    kept = tuple(f.repeat(times, 1) if f.shape[1] > 1 else f for f in data.factors if not varying(f) - {0, 1})
    per_channel = weight_labels(here, weight, letters, times, view)
    factors = meet(here, [Carried(data.name, shape, kept), Carried(weight.name, view, per_channel, weight.constant)])
    for labels in factors:
        here.trace.book.flag(labels, Flag.CURVED)
    return factors


def weight_labels(here: Here, weight: Carried, letters: Letters, times: int, view: tuple[int, ...]) -> Factors:
    """Labels of the weight's first axis, one for every output channel. Where that axis is of inputs (ConvTranspose),
    each of them makes ``times`` outputs, and the other axis tells which: all inputs have the same, so it stays."""
    inputs_first = letters.right[0] == "I"
    found = []
    for labels in weight.factors:
        if varying(labels) == {0}:
            flat = labels.reshape(-1)
            found.append((flat.repeat(times) if inputs_first else flat).reshape(view))
        elif times > 1 and varying(labels) == {1}:
            here.pin(weight, labels, "all groups have the same", 1)
    return tuple(found)
