"""Second moments of activations, per group, as its closed form needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.edit import NoPlace, Place, operand_places, reader_of, value_places
from snpc.passes.groups import APPROXIMATE
from snpc.types import FloatArray, Group

NEEDS: Mapping[str, tuple[str, ...]] = {
    "scores": ("moment:query", "centred:key", "sums:query", "sums:key"),
    "values": ("moment:context", "sums:context"),
    "refit": ("moment:hidden", "sums:hidden"),
}


@dataclass(frozen=True)
class Moments:
    """Second moments of a group's activations: ``first``/``second`` [blocks, d, d] and the mean [blocks, d], over
    ``count`` rows (``second_count`` for ``second``)."""

    first: FloatArray
    second: FloatArray | None = None
    mean: FloatArray | None = None
    count: float = 0.0
    second_count: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Moments of the groups that have a closed form. ``forms``: group id -> "scores", "values" or "refit"; ``skipped``:
    group id -> why it has none; ``samples`` calibration samples were used, of ``source``."""

    analysis: Analysis
    forms: Mapping[str, str]
    moments: Mapping[str, Moments]
    skipped: Mapping[str, str]
    samples: int = 0
    source: str = ""


def form_of(analysis: Analysis, group: Group) -> str:
    """Which closed form fits the group. Raises NoPlace with the reason where none does."""
    if group.role == "qk" and group.freedom == "basis":
        check_sites(group, [*operand_places(analysis.traced, group, 0), *operand_places(analysis.traced, group, 1)])
        return "scores"
    if group.role == "vo" and group.freedom == "basis":
        check_sites(group, [*value_places(analysis.traced, group), reader_of(analysis.traced, group).place])
        return "values"
    if group.role in ("ffn", "conv", "other") and group.blocks == 1:
        if len(reader_of(analysis.traced, group).place.index) != 1:
            raise NoPlace("its reader sees every unit several times")
        return "refit"
    raise NoPlace(group.freedom_reason or f"no closed form for {group.role}")


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


def forms_of(analysis: Analysis, groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, str]]:
    """(group id -> closed form, group id -> why there is none)."""
    forms: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for group in groups:
        if group.freedom_reason == APPROXIMATE:
            continue  # fitted when it is known what goes, see runtime.norms
        try:
            form = form_of(analysis, group)
            check_probes(group, NEEDS[form])
        except NoPlace as reason:
            skipped[group.id] = str(reason)
        else:
            forms[group.id] = form
    return forms, skipped


def check_probes(group: Group, names: Sequence[str]) -> None:
    """Each statistic has one activation to be measured in. Raises NoPlace where it has not."""
    for name in names:
        if sum(p.kind == name.partition(":")[2] for p in group.probes) != 1:
            raise NoPlace("its activations cannot be watched")


def moments_of(form: str, arrays: Mapping[str, FloatArray]) -> Moments:
    """``arrays``: what ``NEEDS`` names, under these names."""
    if form == "scores":
        rows = (float(arrays[f"sums:{kind}"][0, -1]) for kind in ("query", "key"))
        return Moments(arrays["moment:query"], arrays["centred:key"], None, *rows)
    moment, sums = (arrays[name] for name in NEEDS[form])
    total, count = sums[:, :-1], sums[:, -1:]
    mean = total / np.maximum(count, 1.0)
    return Moments(moment - np.einsum("bi,bj->bij", total, mean), None, mean, float(count[0, 0]))


class LazyMoments(Mapping[str, Moments]):
    """Moments by group id, made from its sums when they are asked for: those may lie in files, and are big."""

    def __init__(self, forms: Mapping[str, str], sums: Mapping[str, Mapping[str, FloatArray]]) -> None:
        self.forms = forms
        self.sums = sums

    def __getitem__(self, group: str) -> Moments:
        return moments_of(self.forms[group], self.sums[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)
