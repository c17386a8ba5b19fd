"""The weights around a group: derived once per analysis, and the same whichever reader asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import snpc
from snpc.passes.weights.closed_form_kinds import (
    MAX_REFIT_COLUMNS,
    closed_form_kinds,
    closed_form_weights,
    group_weights,
    refusal_reasons,
)
from snpc.passes.weights.edits import UnsupportedWeightForm
from snpc.types import Group
from tests.oracle import analysis_of
from tests.patching import patch

NAMES = ("vit_timm__ts17", "bert__ts17", "gpt2__ts17", "llama__ts17", "albert__ts17", "qwen3__ts17", "swin_timm__ts17")


def groups_of(name: str) -> list[Group]:
    return [group for group in analysis_of(name).groups if group.prunable]


@pytest.mark.parametrize("name", NAMES)
def test_a_group_has_a_closed_form_or_a_reason_and_never_both(name: str) -> None:
    weights, groups = analysis_of(name).weights, groups_of(name)
    kinds, reasons = closed_form_kinds(weights, groups), refusal_reasons(weights, groups)
    assert not kinds.keys() & reasons.keys()
    assert kinds.keys() | reasons.keys() == {group.id for group in groups if group.role != "residual"}
    assert kinds


@pytest.mark.parametrize("name", NAMES)
def test_weights_cover_the_sites_that_they_stand_for(name: str) -> None:
    analysis = analysis_of(name)
    for group in groups_of(name):
        weights = analysis.weights[group.id]
        consuming = {site.tensor for site in group.sites if site.kind == "consume"}
        if weights.kind == "low_rank_qk":
            tensors = {weight.tensor for side in weights.operands for weight in side}
            assert tensors == {site.tensor for site in group.sites}
            assert weights.products
            assert not weights.uses
        elif weights.kind in ("score_selection", "score_refit"):
            assert weights.products
            assert not weights.consumers
        elif weights.kind is not None:
            assert {consumer.weight_slice.tensor for consumer in weights.consumers} == consuming
            assert [[use.node for use in uses] for uses in weights.uses] == [
                list(consumer.nodes) for consumer in weights.consumers
            ]
        if weights.kind == "low_rank_vo":
            assert {weight.tensor for weight in weights.producers} == {s.tensor for s in group.sites} - consuming


@pytest.mark.parametrize("name", ["vit_timm__ts17", "albert__ts17"])
def test_consumers_hold_the_rows_of_the_units(name: str) -> None:
    """``matrix`` against the rows that the site's own unit numbers pick."""
    analysis = analysis_of(name)
    for group in groups_of(name):
        for consumer in analysis.weights[group.id].consumers if group.role == "ffn" else ():
            (site,) = (s for s in group.sites if s.tensor == consumer.weight_slice.tensor and s.kind == "consume")
            value = analysis.traced_graph.model.graph.initializers[site.tensor].const_value
            assert value is not None
            array = np.moveaxis(value.numpy().astype(np.float64), site.axis, 0)
            expected = array[[int(np.flatnonzero(site.units == unit)[0]) for unit in range(group.size)]]
            np.testing.assert_array_equal(consumer.matrix(analysis.traced_graph), expected)


def test_weights_are_derived_once_per_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first pays; measuring, solving and fitting read the same value."""
    derived: list[str] = []

    def counted(traced_graph: Any, group: Group) -> Any:
        derived.append(group.id)
        return group_weights(traced_graph, group)

    patch(monkeypatch, "snpc.passes.weights.closed_form_kinds.group_weights", counted)
    analysis = snpc.analyze(analysis_of("vit_timm__ts17").model)
    assert not derived, "an analysis alone derives nothing"
    groups = [group for group in analysis.groups if group.role in ("qk", "vo", "ffn")]
    first = [analysis.weights[group.id] for group in groups]
    again = [analysis.weights[group.id] for group in groups]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert sorted(derived) == sorted(group.id for group in groups)


def test_an_approximate_group_has_neither_closed_form_nor_reason() -> None:
    analysis = analysis_of("vit_timm__ts17")
    (residual,) = (group for group in analysis.groups if group.approximate and group.prunable)
    weights = analysis.weights[residual.id]
    assert weights.kind is None
    assert weights.reason == ""


def test_a_consumer_with_too_many_columns_is_not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysis_of("vit_timm__ts17")
    group = next(group for group in analysis.groups if group.role == "ffn")
    assert group.size <= MAX_REFIT_COLUMNS
    assert closed_form_weights(analysis.traced_graph, group).kind == "refit"
    patch(monkeypatch, "snpc.passes.weights.closed_form_kinds.MAX_REFIT_COLUMNS", group.size - 1)
    with pytest.raises(UnsupportedWeightForm, match=str(group.size)):
        closed_form_weights(analysis.traced_graph, group)
    assert group_weights(analysis.traced_graph, group).consumers, "it is known all the same what reads the group"
