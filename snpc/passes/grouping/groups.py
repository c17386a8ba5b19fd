"""From drafts to groups: names, sites, probes, freedom, and the cost that each group accounts for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph import (
    ShapeFacts,
    attribute_values,
    common_module_path,
    contraction_sizes,
    count_macs,
    module_path,
    opset_version,
    unique_names,
)
from snpc.ops import lookup
from snpc.passes.canonicalization import original_name
from snpc.passes.grouping.drafts import GroupDraft
from snpc.passes.grouping.experts import expert_probes, owned_constants
from snpc.passes.grouping.units import Units
from snpc.passes.propagation import Contraction, LabeledAxis, LabeledValue, LabelFlag, LabelPin, Trace
from snpc.types import (
    APPROXIMATE_REASON,
    NORMALIZED_HEADS_REASON,
    NORMALIZED_INSIDE_REASON,
    Freedom,
    Group,
    IntArray,
    Pin,
    Probe,
    ProbeKind,
    SharedProduct,
    Site,
    SiteKind,
)

CHANGES_BASIS = LabelFlag.NONLINEAR | LabelFlag.GATED | LabelFlag.SCALED


def build_groups(
    model: ir.Model, trace: Trace, units: Units, cost_facts: ShapeFacts, drafts: list[GroupDraft]
) -> tuple[tuple[Group, ...], tuple[SharedProduct, ...]]:
    """One group per draft, in order, and what they share. ``cost_facts``: the shapes at which MACs are counted."""
    builder = GroupBuilder(model, trace, units, cost_facts)
    counts = CostCounts(builder)
    names: list[str] = []
    layers: list[int] = []
    counters: dict[str, int] = defaultdict(int)
    numbered = [builder.unit_numbers(draft) for draft in drafts]
    for draft, numbers in zip(drafts, numbered, strict=True):
        counters[draft.role] += 1
        layers.append(counters[draft.role] - 1)
        path = builder.path(numbers)
        names.append(".".join((*path, draft.role)) if path else f"{draft.role}.{layers[-1]}")
    groups = []
    for draft, name, layer, numbers in zip(drafts, unique_names(names), layers, numbered, strict=True):
        freedom, freedom_reason = freedom_and_reason(draft)
        sites = builder.sites(numbers)
        macs, params = counts.add(name, numbers, sites, whole_heads=draft.of_heads)
        owned = owned_constants(trace, units, numbers) if draft.role == "experts" else ()
        params += sum(weight_size(model.graph.initializers[name]) for part in owned for name in part)
        groups.append(
            Group(
                id=name,
                role=draft.role,
                layer=layer,
                blocks=draft.units.shape[0],
                size=draft.units.shape[1],
                sites=sites,
                probes=builder.probes(draft, numbers),
                freedom=freedom,
                freedom_reason=freedom_reason,
                macs=macs,
                params=params,
                pins=tuple(to_pin(pin) for pin in draft.held_by),
                approximate=draft.approximate,
                channels=draft.channels if draft.tie else builder.channels(draft, numbers),
                step=draft.step,
                tie=f"tie.{draft.tie}" if draft.tie else "",
                least=draft.least,
                owned=owned,
                cached=bool(draft.flags & LabelFlag.CACHED),
            )
        )
    return tuple(groups), counts.shared()


def weight_size(value: ir.Value) -> int:
    """How many entries a constant has."""
    assert value.const_value is not None
    return int(value.const_value.size)


def to_pin(pin: LabelPin) -> Pin:
    """The pin as users see it."""
    return Pin(pin.tensor, pin.axis, pin.size, pin.reason, pin.operator, pin.kind)


def freedom_and_reason(draft: GroupDraft) -> tuple[Freedom, str]:
    """How the units of a group may be transformed before they are cut, and why not more freely."""
    if draft.approximate:
        reasons = {"residual": APPROXIMATE_REASON, "qk": NORMALIZED_HEADS_REASON}
        return "select", reasons.get(draft.role, NORMALIZED_INSIDE_REASON)
    if draft.role in ("head", "experts"):
        return "select", "whole heads" if draft.role == "head" else "whole experts"
    if draft.role not in ("qk", "vo") and (draft.role != "ffn" or draft.flags & CHANGES_BASIS):
        return "select", "a nonlinear operator between producer and consumer"
    if draft.flags & LabelFlag.NONLINEAR:
        return "select", "a nonlinear operator or a normalization between producer and consumer"
    if draft.flags & LabelFlag.GATED:
        return "pairs", "multiplied by another activation (rotary position embedding)"
    if draft.flags & LabelFlag.SCALED:
        return "pairs", "multiplied by constants that differ between positions (rotary table or gain)"
    return "basis", ""


class CellIndex:
    """Where cells occur, asked for group by group. ``places``: the cells at each place, which may be repeated."""

    def __init__(self, places: Sequence[IntArray]) -> None:
        distinct = [np.unique(cells) for cells in places]
        cells = np.concatenate(distinct) if distinct else np.zeros(0, np.int64)
        order = np.argsort(cells, kind="stable")
        self._cells = cells[order]
        self._places = np.repeat(np.arange(len(distinct)), [len(part) for part in distinct])[order]

    def places_of(self, cells: Iterable[int]) -> list[int]:
        """The places, in order, at which one of ``cells`` occurs."""
        wanted = np.fromiter(cells, np.int64)
        first, last = (np.searchsorted(self._cells, wanted, side) for side in ("left", "right"))
        counts = last - first
        entries = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return [int(k) for k in np.unique(self._places[entries])]


class GroupBuilder:
    """Finds where the units of a group occur in constants and in contractions.

    ``numbers`` of a group: cell -> index of its unit, or head, within the group (``block * size + position``).
    """

    def __init__(self, model: ir.Model, trace: Trace, units: Units, facts: ShapeFacts) -> None:
        self.model, self.trace, self.units, self.facts = model, trace, units, facts
        self.axes = list(trace.table.axes)
        self.axis_index = CellIndex(
            [units.cell_of_label[a.first_label : a.first_label + a.size] for a in trace.table.axes]
        )
        self.operands: list[tuple[Contraction, LabeledValue, str, int]] = []
        for contraction in trace.contractions:
            for side, letters in (
                (contraction.left, contraction.letters.left),
                (contraction.right, contraction.letters.right),
            ):
                self.operands += [(contraction, side, letters, index) for index in range(len(side.factors))]
        factors = [side.factors[index] for _, side, _, index in self.operands]
        self.operand_index = CellIndex([units.cell_of_label[labels[labels >= 0]] for labels in factors])
        self._numbers: Mapping[int, int] = {}
        self._table = np.zeros(0, np.int64)

        self._cells = np.unique(units.cell_of_label)

    def unit_numbers(self, draft: GroupDraft) -> dict[int, int]:
        """cell -> index within the group, for the cells of its units, or of its heads."""
        owner = (self.units.head_of_label if draft.of_heads else self.units.unit_of_label)[self._cells]
        index = np.full(self.trace.table.count + 1, -1, np.int64)  # the last: of cells outside of heads
        index[draft.units.reshape(-1)] = np.arange(draft.units.size)
        inside = index[owner] >= 0
        return dict(zip(self._cells[inside].tolist(), index[owner[inside]].tolist(), strict=True))

    def number_labels(self, labels: npt.NDArray[np.int32], numbers: Mapping[int, int]) -> IntArray:
        """The index within the group of each label's unit or head, -1 for other labels; shape of ``labels``."""
        if self._numbers is not numbers:  # one group after the other is numbered, on many axes
            self._numbers, self._table = numbers, np.full(self.trace.table.count + 1, -1, np.int64)
            self._table[np.fromiter(numbers, np.int64)] = np.fromiter(numbers.values(), np.int64)
        return np.where(labels >= 0, self._table[self.units.cell_of_label[labels]], -1)

    def axes_of(self, numbers: Mapping[int, int]) -> list[LabeledAxis]:
        """Axes of constants on which the group has units."""
        return [self.axes[k] for k in self.axis_index.places_of(numbers)]

    def sites(self, numbers: Mapping[int, int]) -> tuple[Site, ...]:
        """The sites of a group."""
        sites = []
        for axis in self.axes_of(numbers):
            labels = np.arange(axis.first_label, axis.first_label + axis.size, dtype=np.int32)
            flags = LabelFlag(int(np.bitwise_or.reduce(self.trace.table.flags[labels])))
            kind: SiteKind = (
                "consume"
                if flags & LabelFlag.WEIGHT_INPUT
                else "produce"
                if flags & LabelFlag.PRODUCED
                else ("norm" if flags & LabelFlag.NORM_PARAMETER else "pointwise")
            )
            sites.append(Site(str(axis.constant.name), axis.axis, kind, self.number_labels(labels, numbers)))
        return tuple(sites)

    def contractions(self, numbers: Mapping[int, int]) -> list[tuple[Contraction, LabeledValue, str, int]]:
        """(contraction, operand, its letters, index of the factor) for each factor with units of the group."""
        return [self.operands[k] for k in self.operand_index.places_of(numbers)]

    def channels(self, draft: GroupDraft, numbers: Mapping[int, int]) -> int:
        """Channels of one head that each unit of a qk group stands for: two of a rotary pair; 1 for other groups."""
        counts = [1] if draft.role != "qk" else []
        for contraction, side, letters, index in self.contractions(numbers) if draft.role == "qk" else ():
            labels = side.factors[index]
            summed = [k for k, c in enumerate(letters) if c not in contraction.letters.out and labels.shape[k] > 1]
            if contraction.has_weight or len(summed) != 1:
                continue
            rows = np.moveaxis(self.number_labels(labels, numbers), summed[0], -1).reshape(-1, labels.shape[summed[0]])
            row = next((row[row >= 0] for row in rows if (row >= 0).any()), None)
            if row is not None:
                counts.append(len(row) // len(np.unique(row)))
        return max(min(counts, default=1), 1)

    def path(self, numbers: Mapping[int, int]) -> tuple[str, ...]:
        """The module path that all weights of the group have in common."""
        paths = []
        for contraction, side, *_ in self.contractions(numbers):
            if contraction.has_weight and side.constant:
                names = [
                    original_name(v) for v in contraction.node.inputs if v is not None and v.const_value is not None
                ]
                paths.append(module_path(contraction.node, names))
        return common_module_path(paths)

    def mac_shares(self, numbers: Mapping[int, int]) -> dict[tuple[ir.Node, str], dict[str, float]]:
        """(node, part) of a product -> letter of an axis -> the share of the axis that is units of the group."""
        shares: dict[tuple[ir.Node, str], dict[str, float]] = defaultdict(dict)
        for contraction, side, letters, index in self.contractions(numbers):
            labels = side.factors[index]
            share = float((self.number_labels(labels, numbers) >= 0).mean())
            axes = [k for k, n in enumerate(labels.shape) if n > 1]
            if axes:
                letter, key = letters[axes[-1]], (contraction.node, contraction.part)
                shares[key][letter] = max(share, shares[key].get(letter, 0.0))
        return shares

    def contraction_macs(self, node: ir.Node, part: str) -> int:
        """MACs of one contraction of a node."""
        call = self.facts.call(node, opset_version(self.model, node.domain))
        return sum(count_macs(sizes) for name, _, sizes in contraction_sizes(call, node.domain) if name == part)

    def probes(self, draft: GroupDraft, numbers: Mapping[int, int]) -> tuple[Probe, ...]:
        """The probes of a group: activations in which its units are observed."""
        probes: dict[tuple[str, str], Probe] = {}
        consumed: ProbeKind = "context" if draft.role in ("vo", "head") else "hidden"
        if draft.role == "experts":
            return expert_probes(self.trace, self.units, numbers)
        for contraction, side, letters, index in self.contractions(numbers):
            if side.constant and not side.projected:
                continue
            labels = side.factors[index]
            summed = {c for c in letters if c not in contraction.letters.out}
            varying_letters = {letters[k] for k, n in enumerate(labels.shape) if n > 1}
            kind: ProbeKind | None = None
            if contraction.has_weight and varying_letters & summed:
                kind = consumed
            elif draft.role == "qk" and varying_letters & summed and not contraction.has_weight:
                kind = "query" if side is contraction.left else "key"
            elif draft.role == "vo" and not varying_letters & summed and not contraction.has_weight:
                kind = "value"
            if kind is None or (draft.role == "head" and kind != "context"):
                continue
            probe = self.probe(kind, side, contraction, labels, numbers)
            if probe is not None:
                probes.setdefault((kind, probe.tensor), probe)
        return tuple(probes.values())

    def probe(
        self,
        kind: ProbeKind,
        side: LabeledValue,
        contraction: Contraction,
        labels: npt.NDArray[np.int32],
        numbers: Mapping[int, int],
    ) -> Probe | None:
        """The probe of an operand: the activation itself, or the input of a fused node that contains it."""
        by_name = {v.name: v for v in contraction.node.inputs if v is not None}
        value = by_name.get(side.name)
        if value is None:
            return self.probe_inside_fused_node(kind, side, contraction, labels, numbers)
        labeled_value = self.trace.values[value]
        if labeled_value.shape != side.shape:  # heads are split inside a fused node: the probe is its input
            for labels_of_input in labeled_value.factors:
                numbered_labels = self.number_labels(labels_of_input, numbers)
                if (numbered_labels >= 0).any():
                    return Probe(kind, side.name, numbered_labels)
            return None
        return Probe(kind, side.name, self.number_labels(labels, numbers))

    def probe_inside_fused_node(
        self,
        kind: ProbeKind,
        side: LabeledValue,
        contraction: Contraction,
        labels: npt.NDArray[np.int32],
        numbers: Mapping[int, int],
    ) -> Probe | None:
        """The probe of a projection inside a fused node: [batch, tokens, heads * width]."""
        node = contraction.node
        if lookup(node.domain, node.op_type).kind != "attention" or len(side.shape) != 4:
            return None
        heads = side.shape[1]
        own = heads if side is contraction.left else int(attribute_values(node).get("kv_num_heads", heads))
        whole = np.broadcast_to(labels, (1, heads, 1, side.shape[3]))[:, :: heads // own]
        merged = self.number_labels(whole, numbers).transpose(0, 2, 1, 3).reshape(1, 1, -1)
        return Probe(kind, side.name, merged)


class CostCounts:
    """What groups account for: of products by (node, part), and of constants by name, which share of each axis is units
    of which group."""

    def __init__(self, builder: GroupBuilder) -> None:
        self.builder = builder
        self.products: dict[tuple[ir.Node, str], AxisShares] = defaultdict(AxisShares)
        self.constants: dict[str, AxisShares] = defaultdict(AxisShares)

    def add(
        self, group_id: str, numbers: Mapping[int, int], sites: Sequence[Site], *, whole_heads: bool
    ) -> tuple[int, int]:
        """(MACs, parameters) that are proportional to the group's size. Whole heads have axes of their own."""
        macs = params = 0.0
        beside = "heads" if whole_heads else ""
        for key, by_letter in self.builder.mac_shares(numbers).items():
            counted = self.products[key].counted[group_id] = max(by_letter.values())
            if whole_heads:  # one axis of a product, whichever letters their channels have
                by_letter = {beside: counted}
            for letter, share in by_letter.items():
                self.products[key].axes[letter][group_id] = share
            macs += self.builder.contraction_macs(*key) * counted
        axes: dict[str, dict[str, float]] = defaultdict(dict)
        for site in sites:
            axes[site.tensor][str(site.axis)] = float((site.units >= 0).mean())
        stored = set[int]()
        for name, by_axis in axes.items():
            value = self.builder.model.graph.initializers[name]
            if id(value.const_value) in stored:  # one constant of the file, see ``cost_of``
                continue
            stored.add(id(value.const_value))
            for axis, share in by_axis.items():
                self.constants[name].axes[axis + beside][group_id] = share
            counted = self.constants[name].counted[group_id] = 1 - math.prod(1 - share for share in by_axis.values())
            params += counted * weight_size(value)
        return int(macs), round(params)

    def shared(self) -> tuple[SharedProduct, ...]:
        """The products and constants of which several axes are cut."""
        constants = self.builder.model.graph.initializers
        shared = [
            SharedProduct("macs", self.builder.contraction_macs(*key), tuple(found.axes.values()), found.counted)
            for key, found in self.products.items()
            if len(found.axes) > 1
        ]
        shared += [
            SharedProduct("params", weight_size(constants[name]), tuple(found.axes.values()), found.counted, name)
            for name, found in self.constants.items()
            if len(found.axes) > 1
        ]
        return tuple(shared)


@dataclass
class AxisShares:
    """``axes``: axis -> group id -> share of it that is units of the group. ``counted``: see ``SharedProduct``."""

    axes: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    counted: dict[str, float] = field(default_factory=dict)
