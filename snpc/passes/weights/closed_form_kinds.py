"""Which closed form each group has, or why it has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.passes.weights.attention_operands import (
    operand_weights,
    score_axes,
    score_products,
    value_operands,
    value_weights,
)
from snpc.passes.weights.consumers import ConsumerWeight, consumer_uses, single_consumer_weight
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice
from snpc.types import Group

MAX_REFIT_COLUMNS = 6144  # columns that a reader may see and still be refitted: solving takes time with their cube


def closed_form_kind(analysis: Analysis, group: Group) -> str:
    """Which closed form fits the group. Raises NoPlace with the reason where none does."""
    traced = analysis.traced_graph
    if group.role == "qk" and group.freedom == "basis":
        check_basis_sites(group, [*operand_weights(traced, group, 0), *operand_weights(traced, group, 1)])
        shown = {p.tensor for p in group.probes}
        if any({c.left.name, c.right.name} - shown for c in score_products(traced, group)):
            raise UnsupportedWeightForm("its activations cannot be watched")
        return "scores"
    if group.role == "qk":
        for product in score_products(traced, group):
            score_axes(product, group)
        return "coupled"
    if group.role == "vo" and group.freedom == "basis":
        reader = single_consumer_weight(traced, group)
        check_basis_sites(group, [*value_weights(traced, group), reader.place])
        if len(value_operands(traced, group)) != len(reader.nodes) or len(context_tensors(group)) != len(reader.nodes):
            raise UnsupportedWeightForm("its activations cannot be watched")
        return "values"
    if group.role in ("ffn", "conv", "other", "head", "residual") and group.blocks == 1:
        for use, *_ in consumer_uses(traced, group):
            check_refit_size(group, use.reader)
        return "refit"
    raise UnsupportedWeightForm(group.freedom_reason or f"no closed form for {group.role}")


def context_tensors(group: Group) -> list[str]:
    return [p.tensor for p in group.probes if p.kind == "context"]


def check_refit_size(group: Group, reader: ConsumerWeight) -> None:
    columns = reader.columns * group.size
    if columns > MAX_REFIT_COLUMNS:
        raise UnsupportedWeightForm(
            f"its reader sees {columns} columns, more than are solved for ({MAX_REFIT_COLUMNS})"
        )


def check_basis_sites(group: Group, found: Sequence[WeightSlice]) -> None:
    """A change of basis reaches every site of the group, once. Raises NoPlace where it would not."""
    reached = {(site.tensor, site.axis): np.zeros(len(site.units), np.int64) for site in group.sites}
    for place in found:
        for index in place.index:
            np.add.at(reached[place.tensor, place.axis], index.reshape(-1), 1)
    for site in group.sites:
        count = reached[site.tensor, site.axis]
        if (count > 1).any():
            raise UnsupportedWeightForm(f"{site.tensor} makes both sides of it")
        if (count != (site.units >= 0)).any():
            raise UnsupportedWeightForm(f"{site.tensor} acts on it as well")


def closed_form_kinds(analysis: Analysis, groups: Sequence[Group]) -> tuple[dict[str, str], dict[str, str]]:
    """(group id -> closed form, group id -> why there is none)."""
    forms: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for group in groups:
        if group.approximate:
            continue  # fitted when it is known what goes, see runtime.norms
        try:
            forms[group.id] = closed_form_kind(analysis, group)
        except UnsupportedWeightForm as reason:
            skipped[group.id] = str(reason)
    return forms, skipped
