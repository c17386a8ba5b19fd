"""Whole experts as units: what a router compares does not pin them, but as many stay as it chooses."""

from __future__ import annotations

import numpy as np

from snpc.passes.grouping.units import Units
from snpc.passes.propagation import LabelFlag, LabelPin, Trace
from snpc.types import BoolArray, IntArray


def routed_units(trace: Trace, units: Units) -> BoolArray:
    """[labels]: which units are experts that data choose."""
    routed = np.zeros(trace.table.count, bool)
    flags = trace.table.flags[: trace.table.count]
    routed[units.unit_of_label[(flags & int(LabelFlag.ROUTED)) > 0]] = True
    return routed


def pins_that_hold(trace: Trace, units: Units) -> list[LabelPin]:
    """The pins of all labels, without those of experts for being compared: those that go lose every comparison. An
    expert stays where others are read in another way."""
    routed = routed_units(trace, units)
    return [
        pin for pin in trace.table.pins if pin.kind != "choice" or not routed[units.unit_of_label[pin.labels]].all()
    ]


def least_experts(trace: Trace, units: Units, grid: IntArray) -> int:
    """Of a group with the units ``grid`` [blocks, size]: as many as the router chooses must stay, at least 1."""
    members = np.unique(grid)
    counts = [c.most for c in trace.comparisons if np.isin(units.unit_of_label[np.unique(c.labels)], members).all()]
    return max(counts, default=1) or 1
