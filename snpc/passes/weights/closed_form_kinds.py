"""The weights around each group, and the closed form that they allow.

``group_weights`` derives both from the traced graph, once per group: ``Analysis.weights`` keeps the result, and
statistics, fitting and sensitivity analysis read it from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import Contraction
from snpc.passes.weights.attention_operands import (
    linear_producers,
    operand_weights,
    score_axes,
    score_products,
    shared_operand_weights,
    value_operands,
    value_weights,
)
from snpc.passes.weights.consumers import (
    ConsumerUse,
    ConsumerWeight,
    consumer_uses,
    consumer_weights,
    single_consumer_weight,
)
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightSlice
from snpc.passes.weights.normalizations import HiddenNormalization, hidden_normalizations
from snpc.types import ClosedFormKind, Group, IntArray, Probe, Role

MAX_REFIT_COLUMNS = 16384  # of one consumer weight that a refit solves for: time grows with their cube, docs/cost.md
REFIT_ROLES: tuple[Role, ...] = ("ffn", "conv", "other", "head", "residual")


@dataclass(frozen=True)
class GroupWeights:
    """The weights that produce and consume a group's units, and the closed form that they allow.

    ``kind`` is None where there is no closed form; ``reason`` then says why, and is empty for the residual stream, of
    which normalizations take statistics (``refit_normalizations`` fits it when it is known which units go).
    """

    kind: ClosedFormKind | None
    reason: str = ""
    consumers: tuple[ConsumerWeight, ...] = field(default=(), repr=False)
    """Every weight that reads the units; empty where one of them has an unsupported form."""
    uses: tuple[tuple[ConsumerUse, ...], ...] = field(default=(), repr=False)
    """[consumer][node]: the nodes that use each consumer ("low_rank_vo" and "refit" only)."""
    products: tuple[Contraction, ...] = field(default=(), repr=False)
    """The products in which query and key meet ("low_rank_qk", "score_selection" and "score_refit" only)."""
    operands: tuple[tuple[WeightSlice, ...], tuple[WeightSlice, ...]] = field(default=((), ()), repr=False)
    """The weights that produce the queries, and those that produce the keys ("low_rank_qk" only). Where the same
    weights produce both, they stand first and the second are none."""
    producers: tuple[WeightSlice, ...] = field(default=(), repr=False)
    """The weights that produce the values, or the units of a linear layer that another reads ("low_rank_vo" only)."""

    normalizations: tuple[HiddenNormalization, ...] = field(default=(), repr=False)
    """Inside a hidden layer, or on queries and keys: what is fitted to statistics over fewer units."""

    @property
    def projects_both_alike(self) -> bool:
        """Are queries and keys produced by the same weights?"""
        return self.kind == "low_rank_qk" and not self.operands[1]


class LazyGroupWeights(Mapping[str, GroupWeights]):
    """``GroupWeights`` by group id, each computed when it is first read."""

    def __init__(self, traced_graph: TracedGraph, groups: Sequence[Group]) -> None:
        self.traced_graph = traced_graph
        self.groups = {group.id: group for group in groups}
        self.computed: dict[str, GroupWeights] = {}

    def __getitem__(self, group_id: str) -> GroupWeights:
        if group_id not in self.computed:
            self.computed[group_id] = group_weights(self.traced_graph, self.groups[group_id])
        return self.computed[group_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def group_weights(traced_graph: TracedGraph, group: Group) -> GroupWeights:
    """The weights around one group, and its closed form."""
    if group.approximate and not group.normalized_inside:
        return GroupWeights(None, consumers=supported_consumers(traced_graph, group))
    try:
        weights = closed_form_weights(traced_graph, group)
        return with_normalizations(traced_graph, group, weights) if group.approximate else weights
    except UnsupportedWeightForm as error:
        return GroupWeights(None, str(error), supported_consumers(traced_graph, group))


def with_normalizations(traced_graph: TracedGraph, group: Group, weights: GroupWeights) -> GroupWeights:
    """The same with the normalizations whose gain is fitted: in a hidden layer, or of queries and keys where each of
    their products has one."""
    inside = hidden_normalizations(traced_graph, group, weights.products)
    if weights.kind == "refit":
        return replace(weights, normalizations=inside)
    products = {number for norm in inside for number in norm.products}
    if weights.kind != "score_selection" or len(products) < len(weights.products):
        return weights
    return replace(weights, kind="score_refit", normalizations=inside)


def supported_consumers(traced_graph: TracedGraph, group: Group) -> tuple[ConsumerWeight, ...]:
    """Every weight that reads the group; none where one of them has an unsupported form."""
    try:
        return tuple(consumer_weights(traced_graph, group))
    except UnsupportedWeightForm:
        return ()


def closed_form_weights(traced_graph: TracedGraph, group: Group) -> GroupWeights:
    """As ``group_weights``. Raises UnsupportedWeightForm with the reason where no closed form fits the group."""
    if group.role == "qk" and group.freedom == "basis":
        return query_key_weights(traced_graph, group)
    if group.role == "qk":
        products = tuple(score_products(traced_graph, group))
        for product in products:
            score_axes(product, group)
        return GroupWeights("score_selection", products=products)
    if group.role == "vo" and group.freedom == "basis":
        return value_output_weights(traced_graph, group)
    if group.freedom == "basis":
        try:
            return linear_layer_weights(traced_graph, group)
        except UnsupportedWeightForm:
            pass  # its units can be selected, and its readers refitted
    if group.role in REFIT_ROLES and group.blocks == 1:
        uses = tuple(tuple(nodes) for nodes in consumer_uses(traced_graph, group))
        consumers = tuple(nodes[0].consumer for nodes in uses)
        for consumer in consumers:
            check_refit_size(group, consumer)
        return GroupWeights("refit", consumers=consumers, uses=uses)
    raise UnsupportedWeightForm(group.freedom_reason or f"no closed form for {group.role}")


def query_key_weights(traced_graph: TracedGraph, group: Group) -> GroupWeights:
    """Of a qk group whose basis is free."""
    queries, keys = query_and_key_producers(traced_graph, group)
    check_basis_sites(group, [*queries, *keys])
    products = tuple(score_products(traced_graph, group))
    probed = {probe.tensor for probe in group.probes}
    if any({product.left.name, product.right.name} - probed for product in products):
        raise UnsupportedWeightForm("its activations cannot be measured")
    if any(splits_blocks(probe, group) for probe in group.probes):
        raise UnsupportedWeightForm("parts of one head meet in products of their own")
    return GroupWeights("low_rank_qk", products=products, operands=(queries, keys))


def splits_blocks(probe: Probe, group: Group) -> bool:
    """Whether a probe shows some units of a block and not the others, or shows them less often."""
    counts = np.bincount(probe.units[probe.units >= 0], minlength=group.blocks * group.size).reshape(group.blocks, -1)
    return bool((counts != counts[:, :1]).any())


def values_per_unit(traced_graph: TracedGraph, group: Group) -> IntArray:
    """[units]: in how many products of attention weights and values each unit is a value."""
    probes = {probe.tensor: probe for probe in group.probes if probe.kind == "value"}
    total = np.zeros(group.blocks * group.size, np.int64)
    for operand in value_operands(traced_graph, group):
        units = probes[operand.side.name].units
        total[np.unique(units[units >= 0])] += 1
    return total


def query_and_key_producers(
    traced_graph: TracedGraph, group: Group
) -> tuple[tuple[WeightSlice, ...], tuple[WeightSlice, ...]]:
    """The weights that produce queries, and those that produce keys; none of the latter where they are the same.

    Raises UnsupportedWeightForm where they cannot be rotated.
    """
    try:
        return tuple(operand_weights(traced_graph, group, 0)), tuple(operand_weights(traced_graph, group, 1))
    except UnsupportedWeightForm as error:
        try:
            return tuple(shared_operand_weights(traced_graph, group)), ()
        except UnsupportedWeightForm:
            raise error from None


def linear_layer_weights(traced_graph: TracedGraph, group: Group) -> GroupWeights:
    """Of hidden units with nothing but linear operators between the weights that produce and read them, as where a
    message is concatenated to its stream in front of a layer."""
    consumer = single_consumer_weight(traced_graph, group)
    producers = tuple(linear_producers(traced_graph, group))
    check_basis_sites(group, [*producers, consumer.weight_slice])
    uses = tuple(tuple(nodes) for nodes in consumer_uses(traced_graph, group))
    return GroupWeights("low_rank_vo", consumers=(consumer,), uses=uses, producers=producers)


def value_output_weights(traced_graph: TracedGraph, group: Group) -> GroupWeights:
    """Of a vo group whose basis is free."""
    consumer = single_consumer_weight(traced_graph, group)
    producers = tuple(value_weights(traced_graph, group))
    check_basis_sites(group, [*producers, consumer.weight_slice])
    contexts = [probe for probe in group.probes if probe.kind == "context"]
    products = values_per_unit(traced_graph, group)
    if (products != len(contexts)).any() or len(contexts) != len(consumer.nodes):
        raise UnsupportedWeightForm("its activations cannot be measured")
    if any(splits_blocks(probe, group) for probe in group.probes):
        raise UnsupportedWeightForm("parts of one head meet in products of their own")
    uses = tuple(tuple(nodes) for nodes in consumer_uses(traced_graph, group))
    return GroupWeights("low_rank_vo", consumers=(consumer,), uses=uses, producers=producers)


def check_refit_size(group: Group, consumer: ConsumerWeight) -> None:
    """Raise UnsupportedWeightForm where the least-squares system of a refit would be too large."""
    columns = consumer.columns * group.size
    if columns > MAX_REFIT_COLUMNS:
        raise UnsupportedWeightForm(
            f"its consumer has {columns} input columns, more than a refit solves for ({MAX_REFIT_COLUMNS})"
        )


def check_basis_sites(group: Group, slices: Sequence[WeightSlice]) -> None:
    """A change of basis reaches every site of the group, once. Raises UnsupportedWeightForm where it would not."""
    reached = {(site.tensor, site.axis): np.zeros(len(site.units), np.int64) for site in group.sites}
    for weight_slice in slices:
        for index in weight_slice.index:
            np.add.at(reached[weight_slice.tensor, weight_slice.axis], index.reshape(-1), 1)
    for site in group.sites:
        count = reached[site.tensor, site.axis]
        if (count > 1).any():
            raise UnsupportedWeightForm(f"{site.tensor} produces both sides of its product")
        if (count != (site.units >= 0)).any():
            raise UnsupportedWeightForm(f"{site.tensor} applies to it as well, which a change of basis does not allow")


def closed_form_kinds(weights: Mapping[str, GroupWeights], groups: Sequence[Group]) -> dict[str, ClosedFormKind]:
    """Group id -> closed form, of these groups that have one."""
    kinds = {group.id: weights[group.id].kind for group in groups}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def refusal_reasons(weights: Mapping[str, GroupWeights], groups: Sequence[Group]) -> dict[str, str]:
    """Group id -> why it has no closed form, of these groups that have none."""
    return {group.id: weights[group.id].reason for group in groups if weights[group.id].reason}
