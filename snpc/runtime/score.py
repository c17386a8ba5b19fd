"""analysis (+ calibration data) -> scores: what a criterion says of every unit of every group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from snpc.criteria import Criterion, make_criterion, needs_data
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.plan import Scores
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.measure import Wanted, measure, wanted_statistics
from snpc.types import FloatArray, Group, IntArray, Numbers, Role, Site

Progress = Callable[[Iterable[Feeds]], Iterable[Feeds]]


def score(
    analysis: Analysis,
    criterion: str | Criterion = "magnitude",
    calibration: Calibration | None = None,
    *,
    roles: Sequence[Role] = ("qk", "vo", "ffn"),
    skip: Collection[str] = (),
    provider: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score the units of every prunable group of ``roles`` but those whose ids are in ``skip``.

    ``criterion``: a name with options ("snp:terms=4") or a ``Criterion``. Raises UserError where it needs calibration
    data and there is none.
    """
    judge = make_criterion(criterion) if isinstance(criterion, str) else criterion
    groups = [g for g in analysis.groups if g.role in roles and g.prunable and g.size > 1 and g.id not in skip]
    needed = {g.id: judge.probes(g.role) for g in groups}
    wanted = wanted_statistics(analysis, needed)
    if calibration is None and needs_data(judge, [g.role for g in groups]):
        needy = ", ".join(sorted({g.role for g in groups if needed[g.id]}))
        raise UserError(
            f"criterion {judge.name} needs calibration data for {needy}: "
            "give --calib DATA, or choose --criterion magnitude"
        )
    sums: dict[str, dict[str, FloatArray]] = defaultdict(dict)
    samples = 0
    if wanted and calibration is not None:
        batches: Iterable[Feeds] = calibration.batches()
        for result in measure(
            analysis, wanted, progress(batches) if progress else batches, provider=provider, threads=threads
        ):
            observe(judge, wanted, result, sums)
        samples = calibration.samples
    values = {g.id: judge.score(numbers_of(analysis, g, sums.get(g.id, {}), samples)) for g in groups}
    return Scores(analysis, judge.name if not isinstance(criterion, str) else criterion, values, samples)


def observe(
    judge: Criterion, wanted: Sequence[Wanted], result: Mapping[str, FloatArray], sums: dict[str, dict[str, FloatArray]]
) -> None:
    """Add one batch's statistics to ``sums``."""
    batch: dict[str, dict[str, FloatArray]] = defaultdict(dict)
    groups: dict[str, Group] = {}
    for item in wanted:
        groups[item.group.id] = item.group
        key = item.name
        array = result[item.output]
        mine = batch[item.group.id]
        mine[key] = mine[key] + array if key in mine and mine[key].shape == array.shape else array
    for name, arrays in batch.items():
        for key, summed in judge.observe(groups[name].role, arrays).items():
            sums[name][key] = sums[name][key] + summed if key in sums[name] else summed


# -- weights as rows per unit ----------------------------------------------------------------------------------------


def numbers_of(analysis: Analysis, group: Group, sums: Mapping[str, FloatArray], samples: int) -> Numbers:
    produce: Mapping[str, FloatArray]
    consume: Mapping[str, FloatArray]
    produce, consume = head_rows(analysis, group) if group.role == "head" else own_rows(analysis, group)
    return Numbers(group.role, group.blocks, group.size, produce, consume, sums, samples)


class Rows(Mapping[str, FloatArray]):
    """Weights as rows per unit, each made when it is read: a group of many layers need not fit into memory."""

    def __init__(self, makers: Mapping[str, Callable[[], FloatArray]]) -> None:
        self.makers = dict(makers)

    def __getitem__(self, name: str) -> FloatArray:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def own_rows(analysis: Analysis, group: Group) -> tuple[Rows, Rows]:
    """weight name -> [blocks * size, fan] for what makes the units, and for what reads them."""
    produce: dict[str, Callable[[], FloatArray]] = {}
    consume: dict[str, Callable[[], FloatArray]] = {}
    for site in group.sites:
        if site.kind in ("produce", "consume"):
            target = produce if site.kind == "produce" else consume
            for k in range(occurrences(np.asarray(site.units))):
                name = site.tensor if not k else f"{site.tensor}#{k}"
                target[name] = partial(unit_rows, analysis, site, group, k)
    return Rows(produce), Rows(consume)


def occurrences(units: IntArray) -> int:
    """How often a packed weight holds a unit (its Q and its K column)."""
    return int(np.bincount(units[units >= 0]).max(initial=0))


def unit_rows(analysis: Analysis, site: Site, group: Group, k: int) -> FloatArray:
    """[units, fan]: the k-th row of each unit in the site's weight; zeros where it has fewer."""
    value = analysis.traced.model.graph.initializers[site.tensor].const_value
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
        makes, reads = own_rows(analysis, child)
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
