"""What a criterion sees of a group: its weights as rows per unit, and sums of the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.types import CriterionInputs, FloatArray, Group, IntArray, Site


def criterion_inputs(analysis: Analysis, group: Group, sums: Mapping[str, FloatArray], samples: int) -> CriterionInputs:
    produce: Mapping[str, FloatArray]
    consume: Mapping[str, FloatArray]
    produce, consume = head_rows(analysis, group) if group.role == "head" else ({}, {})
    if not produce and not consume:  # heads may have an axis of their own
        produce, consume = group_weight_rows(analysis, group)
    return CriterionInputs(group.role, group.blocks, group.size, produce, consume, sums, samples)


def unit_weight_energies(analysis: Analysis, groups: Sequence[Group]) -> dict[str, FloatArray]:
    """group id -> [blocks, size]: squares of all weights that make a unit or read it, added up."""
    found = {}
    for group in groups:
        made = criterion_inputs(analysis, group, {}, 0)
        total = np.zeros(group.blocks * group.size)
        for rows in (*made.produce.values(), *made.consume.values()):
            total += np.square(rows).sum(1)
        found[group.id] = total.reshape(group.blocks, group.size)
    return found


class LazyRows(Mapping[str, FloatArray]):
    """Weights as rows per unit, each made when it is read: a group of many layers need not fit into memory."""

    def __init__(self, makers: Mapping[str, Callable[[], FloatArray]]) -> None:
        self.makers = dict(makers)

    def __getitem__(self, name: str) -> FloatArray:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def group_weight_rows(analysis: Analysis, group: Group) -> tuple[LazyRows, LazyRows]:
    """weight name -> [blocks * size, fan] for what makes the units, and for what reads them."""
    produce: dict[str, Callable[[], FloatArray]] = {}
    consume: dict[str, Callable[[], FloatArray]] = {}
    for site in group.sites:
        if site.kind in ("produce", "consume"):
            target = produce if site.kind == "produce" else consume
            for k in range(max_occurrences(np.asarray(site.units))):
                name = site.tensor if not k else f"{site.tensor}#{k}"
                target[name] = partial(unit_rows, analysis, site, group, k)
    return LazyRows(produce), LazyRows(consume)


def max_occurrences(units: IntArray) -> int:
    """How often a packed weight holds a unit (its Q and its K column)."""
    return int(np.bincount(units[units >= 0]).max(initial=0))


def unit_rows(analysis: Analysis, site: Site, group: Group, k: int) -> FloatArray:
    """[units, fan]: the k-th row of each unit in the site's weight; zeros where it has fewer."""
    value = analysis.traced_graph.model.graph.initializers[site.tensor].const_value
    assert value is not None
    units = np.asarray(site.units)
    place = np.flatnonzero(units >= 0)
    place = place[np.argsort(units[place], kind="stable")]
    owner = units[place]
    mine = np.arange(len(owner)) - np.searchsorted(owner, owner) == k  # the how-many-eth row of its unit
    rows: FloatArray = np.moveaxis(np.asarray(value.numpy()).take(place[mine], site.axis), site.axis, 0)
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    count = group.blocks * group.size
    if len(rows) == count:  # in the order of their units
        return rows
    picked = np.zeros((count, rows.shape[1]))
    picked[owner[mine]] = rows
    return picked


def head_rows(analysis: Analysis, group: Group) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """The rows of a head's Q/K and V units, flattened per head; keys are prefixed "qk:" or "vo:"."""
    produce: dict[str, FloatArray] = {}
    consume: dict[str, FloatArray] = {}
    for child in analysis.groups:
        heads = blocks_to_heads(group, child) if child.role in ("qk", "vo") else None
        if heads is None:
            continue
        makes, reads = group_weight_rows(analysis, child)
        for rows, target in ((makes, produce), (reads, consume)):
            for name, array in rows.items():
                flat = array.reshape(child.blocks, -1)
                ordered = np.zeros((group.size, flat.shape[1]))
                ordered[heads] = flat
                target[f"{child.role}:{name}"] = ordered
    return produce, consume


def blocks_to_heads(group: Group, child: Group) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """For each block of ``child`` the head that covers it; None where it is not this group's child."""
    mine = {(s.tensor, s.axis): s.units for s in group.sites}
    heads = np.full(child.blocks, -1, np.int64)
    for site in child.sites:
        units = mine.get((site.tensor, site.axis))
        if units is not None:
            both = (site.units >= 0) & (units >= 0)
            heads[site.units[both] // child.size] = units[both]
    return heads if (heads >= 0).all() else None
