"""Second moments of activations, per group, as its closed form needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.edit import NoPlace, Place
from snpc.passes.products import operand_places, score_products, sides_of, value_operands, value_places
from snpc.passes.readers import Reader, reader_of, uses_of
from snpc.runtime.triangle import unpacked
from snpc.types import APPROXIMATE, FloatArray, Group

KINDS = frozenset(
    {"moment", "centred", "sums", "apart", "joint", "coupled"}
)  # of the statistics that closed forms take
FEW = 64  # rows
ROUNDED = 1e-6  # of the square of a mean: what rounding leaves of it, times the root of how many columns there are
MOST = 6144  # columns that a reader may see and still be refitted: solving takes time with their cube


@dataclass(frozen=True)
class Seen:
    """What one weight reads of a group: the second moment [n, n] of its columns about their mean at each node that uses
    it, summed over these nodes; the means [n] there; how many rows."""

    moment: FloatArray
    means: tuple[FloatArray, ...]
    count: float


@dataclass(frozen=True)
class Moments:
    """Second moments of a group's activations, as its form needs them.

    "scores": ``first`` (queries) and ``second`` (centred keys) [blocks, d, d], over ``count`` and ``second_count``
    rows. "coupled": ``first``, what the scores lose [blocks, size, size]. "values": ``contexts`` [blocks][repeats].
    "refit": ``contexts`` [1][readers].
    """

    first: FloatArray | None = None
    second: FloatArray | None = None
    count: float = 0.0
    second_count: float = 0.0
    contexts: tuple[tuple[Seen, ...], ...] = ()


@dataclass(frozen=True)
class Measured:
    """Moments of the groups that have a closed form. ``forms``: group id -> "scores", "coupled", "values" or "refit";
    ``skipped``: group id -> why it has none; ``samples`` calibration samples were used, of ``source``."""

    analysis: Analysis
    forms: Mapping[str, str]
    moments: Mapping[str, Moments]
    skipped: Mapping[str, str]
    samples: int = 0
    source: str = ""


def form_of(analysis: Analysis, group: Group) -> str:
    """Which closed form fits the group. Raises NoPlace with the reason where none does."""
    traced = analysis.traced
    if group.role == "qk" and group.freedom == "basis":
        check_sites(group, [*operand_places(traced, group, 0), *operand_places(traced, group, 1)])
        shown = {p.tensor for p in group.probes}
        if any({c.left.name, c.right.name} - shown for c in score_products(traced, group)):
            raise NoPlace("its activations cannot be watched")
        return "scores"
    if group.role == "qk":
        for product in score_products(traced, group):
            sides_of(product, group)
        return "coupled"
    if group.role == "vo" and group.freedom == "basis":
        reader = reader_of(traced, group)
        check_sites(group, [*value_places(traced, group), reader.place])
        if len(value_operands(traced, group)) != len(reader.nodes) or len(contexts(group)) != len(reader.nodes):
            raise NoPlace("its activations cannot be watched")
        return "values"
    if group.role in ("ffn", "conv", "other", "head", "residual") and group.blocks == 1:
        for use, *_ in uses_of(traced, group):
            check_reader(group, use.reader)
        return "refit"
    raise NoPlace(group.freedom_reason or f"no closed form for {group.role}")


def contexts(group: Group) -> list[str]:
    return [p.tensor for p in group.probes if p.kind == "context"]


def check_reader(group: Group, reader: Reader) -> None:
    columns = reader.columns * group.size
    if columns > MOST:
        raise NoPlace(f"its reader sees {columns} columns, more than are solved for ({MOST})")


def check_sites(group: Group, found: Sequence[Place]) -> None:
    """A change of basis reaches every site of the group, once. Raises NoPlace where it would not."""
    reached = {(site.tensor, site.axis): np.zeros(len(site.units), np.int64) for site in group.sites}
    for place in found:
        for index in place.index:
            np.add.at(reached[place.tensor, place.axis], index.reshape(-1), 1)
    for site in group.sites:
        count = reached[site.tensor, site.axis]
        if (count > 1).any():
            raise NoPlace(f"{site.tensor} makes both sides of it")
        if (count != (site.units >= 0)).any():
            raise NoPlace(f"{site.tensor} acts on it as well")


def needs(analysis: Analysis, group: Group, form: str) -> tuple[str, ...]:
    """Names of the statistics that a form takes. Those with "#" are of one activation: "joint:hidden#0.1" of the second
    node that uses the first reader."""
    if form == "scores":
        return ("moment:query", "centred:key", "sums:query", "sums:key")
    if form == "coupled":
        return ("coupled:query",)
    if form == "values":
        return tuple(f"apart:context#0.{k}" for k in range(len(contexts(group))))
    uses = uses_of(analysis.traced, group)
    return tuple(f"joint:{use.probe.kind}#{r}.{k}" for r, mine in enumerate(uses) for k, use in enumerate(mine))


def forms_of(analysis: Analysis, groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, str]]:
    """(group id -> closed form, group id -> why there is none)."""
    forms: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for group in groups:
        if group.freedom_reason == APPROXIMATE:
            continue  # fitted when it is known what goes, see runtime.norms
        try:
            forms[group.id] = form_of(analysis, group)
        except NoPlace as reason:
            skipped[group.id] = str(reason)
    return forms, skipped


def moments_of(form: str, arrays: Mapping[str, FloatArray]) -> Moments:
    """``arrays``: what ``needs`` names, under these names."""
    if form == "scores":
        queries, keys = (float(arrays[f"sums:{kind}"][0, -1]) for kind in ("query", "key"))
        return Moments(arrays["moment:query"], arrays["centred:key"], queries, keys)
    if form == "coupled":
        return Moments(arrays["coupled:query"])
    readers: dict[int, dict[int, FloatArray]] = defaultdict(dict)
    for name, array in arrays.items():
        reader, use = name.partition("#")[2].split(".")
        readers[int(reader)][int(use)] = array
    uses = [[mine[k] for k in sorted(mine)] for _, mine in sorted(readers.items())]
    if form == "refit":
        return Moments(contexts=(tuple(seen([unpacked(sums) for sums in mine]) for mine in uses),))
    repeats, blocks = uses[0][0].shape[:2]
    return Moments(
        contexts=tuple(tuple(seen([a[r, b].copy() for a in uses[0]]) for r in range(repeats)) for b in range(blocks))
    )


def seen(sums: Sequence[FloatArray]) -> Seen:
    """From X'X [n + 1, n + 1] per use, with a column of ones behind the others; taken over.

    X'X was summed in float32, so where a column hardly varies about its mean what is left without the mean is rounding,
    and may be negative: that much of the mean stays on the diagonal.
    """
    counts = [max(float(s[-1, -1]), 1.0) for s in sums]
    means = tuple(s[-1, :-1] / n for s, n in zip(sums, counts, strict=True))
    moment: FloatArray | None = None
    for total, count, mean in zip(sums, counts, means, strict=True):
        centred = total[:-1, :-1]
        for start in range(0, len(mean), FEW):  # in pieces that stay in the cache
            piece = slice(start, start + FEW)
            centred[piece] -= np.outer(count * mean[piece], mean)
        centred.flat[:: len(mean) + 1] += ROUNDED * np.sqrt(len(mean)) * count * mean**2
        moment = centred if moment is None else moment + centred
    assert moment is not None
    return Seen(moment, means, sum(counts))


class LazyMoments(Mapping[str, Moments]):
    """Moments by group id, made from its sums when they are asked for: those may lie in files, and are big."""

    def __init__(self, forms: Mapping[str, str], sums: Mapping[str, Mapping[str, FloatArray]]) -> None:
        self.forms = forms
        self.sums = sums
        self.last: tuple[str, Moments] | None = None  # asked for again, for the next width

    def __getitem__(self, group: str) -> Moments:
        if self.last is None or self.last[0] != group:
            self.last = (group, moments_of(self.forms[group], self.sums[group]))
        return self.last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)
