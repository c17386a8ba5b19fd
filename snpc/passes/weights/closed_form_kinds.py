"""Which closed form each group has, or why it has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.weights.attention_operands import (
    operand_places,
    score_products,
    sides_of,
    value_operands,
    value_places,
)
from snpc.passes.weights.consumers import Reader, reader_of, uses_of
from snpc.passes.weights.edits import NoPlace, Place
from snpc.types import APPROXIMATE, Group

MOST = 6144  # columns that a reader may see and still be refitted: solving takes time with their cube


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
