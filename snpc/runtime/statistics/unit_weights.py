"""The inputs of a criterion: the weights of a group as one row per unit, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from snpc.errors import UserError
from snpc.graph import is_float
from snpc.passes import Analysis
from snpc.passes.canonicalization import original_name
from snpc.types import CriterionInputs, FloatArray, Group, IntArray, Site


def criterion_inputs(analysis: Analysis, group: Group, sums: Mapping[str, FloatArray], samples: int) -> CriterionInputs:
    """All that a criterion sees of the group; ``sums``: its statistics over ``samples`` samples."""
    produce: Mapping[str, FloatArray]
    consume: Mapping[str, FloatArray]
    produce, consume = head_rows(analysis, group) if group.role == "head" else ({}, {})
    if not produce and not consume:  # heads with an axis of their own are units like others
        produce, consume = group_weight_rows(analysis, group)
    if group.owned:
        consume = {**consume, "owned": owned_norms(analysis, group)}
    return CriterionInputs(group.role, group.blocks, group.size, produce, consume, sums, samples)


def owned_norms(analysis: Analysis, group: Group) -> FloatArray:
    """[units, 1]: the norm of all constants that a unit has for itself."""
    initializers = analysis.traced_graph.model.graph.initializers
    norms = np.zeros((len(group.owned), 1))
    for unit, names in enumerate(group.owned):
        for name in names:
            tensor = initializers[name].const_value
            assert tensor is not None
            norms[unit] = np.hypot(norms[unit], np.linalg.norm(tensor.numpy().astype(np.float64)))
    return norms


def unit_weight_energies(analysis: Analysis, groups: Sequence[Group]) -> dict[str, FloatArray]:
    """Group id -> [blocks, size]: the sum of squares of all weights that produce or consume a unit."""
    energies = {}
    for group in groups:
        inputs = criterion_inputs(analysis, group, {}, 0)
        total = np.zeros(group.blocks * group.size)
        for rows in (*inputs.produce.values(), *inputs.consume.values()):
            total += np.square(rows).sum(1)
        energies[group.id] = total.reshape(group.blocks, group.size)
    return energies


def check_finite_weights(analysis: Analysis, groups: Sequence[Group]) -> None:
    """Raise UserError where a weight of these groups holds NaN or infinity: no unit could be compared with another."""
    initializers = analysis.traced_graph.model.graph.initializers
    for group in groups:
        for name in dict.fromkeys(site.tensor for site in group.sites):
            tensor = initializers[name].const_value
            if tensor is None or not is_float(tensor.dtype):
                continue
            array = tensor.numpy()
            bad = ~np.isfinite(array)
            if bad.any():
                where = [int(k) for k in np.argwhere(bad)[0]]
                raise UserError(
                    f"{analysis.model.path}: the weight {original_name(initializers[name])} of {group.id} holds "
                    f"{array[tuple(where)]} at {where} ({int(bad.sum())} such entries): repair the model, or leave the "
                    "group out (--exclude)"
                )


class LazyRows(Mapping[str, FloatArray]):
    """Weight name -> its rows per unit, loaded on each access: the weights of a large group need not fit into memory at
    once."""

    def __init__(self, loaders: Mapping[str, Callable[[], FloatArray]]) -> None:
        self.loaders = dict(loaders)

    def __getitem__(self, name: str) -> FloatArray:
        return self.loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)


def group_weight_rows(analysis: Analysis, group: Group) -> tuple[LazyRows, LazyRows]:
    """Weight name -> [blocks * size, fan]: of the weights that produce the units, and of those that consume them."""
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
    """How many positions of a weight one unit has at most (two in a packed weight: its Q and its K column)."""
    return int(np.bincount(units[units >= 0]).max(initial=0))


def unit_rows(analysis: Analysis, site: Site, group: Group, k: int) -> FloatArray:
    """[units, fan]: row number ``k`` of each unit in the site's weight; zeros where a unit has fewer rows."""
    value = analysis.traced_graph.model.graph.initializers[site.tensor].const_value
    assert value is not None
    units = np.asarray(site.units)
    positions = np.flatnonzero(units >= 0)
    positions = positions[np.argsort(units[positions], kind="stable")]
    owner = units[positions]
    chosen = np.arange(len(owner)) - np.searchsorted(owner, owner) == k  # row number k of its unit
    rows: FloatArray = np.moveaxis(np.asarray(value.numpy()).take(positions[chosen], site.axis), site.axis, 0)
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    count = group.blocks * group.size
    if len(rows) == count:  # sorted by unit already
        return rows
    by_unit = np.zeros((count, rows.shape[1]))
    by_unit[owner[chosen]] = rows
    return by_unit


def head_rows(analysis: Analysis, group: Group) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Of whole heads: the rows of their qk and vo units, flattened per head; names start with "qk:" or "vo:"."""
    produce: dict[str, FloatArray] = {}
    consume: dict[str, FloatArray] = {}
    for child in analysis.groups:
        heads = blocks_to_heads(group, child) if child.role in ("qk", "vo") else None
        if heads is None:
            continue
        producers, consumers = group_weight_rows(analysis, child)
        for rows, target in ((producers, produce), (consumers, consume)):
            for name, array in rows.items():
                flat = array.reshape(child.blocks, -1)
                ordered = np.zeros((group.size, flat.shape[1]))
                ordered[heads] = flat
                target[f"{child.role}:{name}"] = ordered
    return produce, consume


def blocks_to_heads(group: Group, child: Group) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
    """[child.blocks]: the head that each block of ``child`` belongs to; None: it has no heads here."""
    units_at = {(site.tensor, site.axis): site.units for site in group.sites}
    heads = np.full(child.blocks, -1, np.int64)
    for site in child.sites:
        units = units_at.get((site.tensor, site.axis))
        if units is not None:
            both = (site.units >= 0) & (units >= 0)
            heads[site.units[both] // child.size] = units[both]
    return heads if (heads >= 0).all() else None
