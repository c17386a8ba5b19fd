"""Groups that one kernel reads keep equally many channels, in steps that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import snpc
from snpc.planning.allocate import allocate_widths
from snpc.planning.config import allowed_widths
from snpc.planning.tied_widths import (
    check_kept_widths,
    check_ties_are_whole,
    common_widths,
    groups_ranked_together,
    smallest_widths,
    tied_sets,
)
from snpc.types import Group, Role
from tests.models.groups import make_group


def scores(values: Mapping[str, Any], *groups: Group) -> snpc.UnitScores:
    cost = SimpleNamespace(macs=sum(g.macs for g in groups), params=1, bytes=1)
    made = SimpleNamespace(
        groups=groups, cost=cost, model=None, traced_graph=None, saved_before=lambda kind: 0, shared_products=()
    )
    return snpc.UnitScores(cast(snpc.Analysis, made), "made", values)


def tied_group(name: str, role: Role, size: int, channels: int = 1, step: int = 1, tie: str = "t") -> Group:
    return replace(make_group(name, role, 2, size), channels=channels, step=step, tie=tie)


PAIRS = tied_group("k", "qk", 32, channels=2, step=8)
VALUES = tied_group("v", "vo", 64, step=16)
FREE = make_group("f", "ffn", 1, 40)


def test_sets_are_in_order_of_their_first_group() -> None:
    sets = tied_sets([FREE, PAIRS, make_group("g", "ffn", 1, 4), VALUES])
    assert [[g.id for g in members] for members in sets] == [["f"], ["k", "v"], ["g"]]


def test_widths_are_those_that_all_may_have() -> None:
    assert common_widths([PAIRS, VALUES], snpc.Budget(0.5)) == [(32, 64), (24, 48), (16, 32), (8, 16)]
    assert common_widths([PAIRS, VALUES], snpc.Budget(0.5, max_ratio={"vo": 0.5})) == [(32, 64), (24, 48), (16, 32)]
    assert common_widths([PAIRS, VALUES], snpc.Budget(0.5, round_to=32)) == [(32, 64), (16, 32)]
    assert smallest_widths([PAIRS, FREE, VALUES], snpc.Budget(0.5, min_width=20)) == {"k": 16, "f": 20, "v": 32}


def test_fast_head_sizes_are_taken_where_there_are_some() -> None:
    budget = snpc.Budget(0.5, head_sizes=(32, 64, 128))
    assert allowed_widths(VALUES, budget) == [64, 32]
    assert allowed_widths(PAIRS, budget) == [32, 16]
    assert allowed_widths(VALUES, snpc.Budget(0.5, head_sizes=(64,))) == [64, 48, 32, 16]
    assert allowed_widths(FREE, budget) == list(range(40, 0, -1))


@pytest.mark.parametrize(("multiple", "widths"), [(1, range(32, 0, -1)), (8, range(32, 0, -4)), (32, (32, 16))])
def test_multiples_count_channels(multiple: int, widths: range) -> None:
    """A rotary pair is two channels of a head: 64 wide heads rounded to 32 keep 16 pairs."""
    pairs = replace(PAIRS, step=1, tie="")
    assert allowed_widths(pairs, snpc.Budget(0.5, round_to=multiple)) == list(widths)


def test_roles_that_a_tie_connects_are_ranked_together() -> None:
    alone = make_group("a", "vo", 1, 8)
    assert groups_ranked_together([PAIRS, VALUES, FREE, alone], ("qk", "vo", "ffn")) == [[PAIRS, VALUES, alone], [FREE]]
    assert groups_ranked_together([alone, FREE], ("qk", "vo", "ffn")) == [[], [alone], [FREE]]


@pytest.mark.parametrize(
    "budget",
    [snpc.Budget(0.4), snpc.Budget(0.4, uniform=True), snpc.Budget(target="macs=0.6"), snpc.Budget(max_drift=0.8)],
)
def test_every_allocation_keeps_ties(budget: snpc.Budget) -> None:
    rng = np.random.default_rng(0)
    groups = [PAIRS, FREE, VALUES, tied_group("w", "vo", 64, step=16)]
    made = scores({g.id: rng.random((g.blocks, g.size)) for g in groups}, *groups)
    curves = {g.id: np.linspace(1, 0, g.size + 1) ** 2 for g in groups}
    widths = allocate_widths(groups, replace(made, curves=curves if budget.ratio is None else {}), budget)
    assert widths["k"] * 2 == widths["v"] == widths["w"]
    assert widths["k"] in (8, 16, 24)


def test_the_cheapest_set_goes_first() -> None:
    """What a step costs is the sum over the groups that it narrows."""
    cheap, dear = tied_group("c", "qk", 4, tie="1"), tied_group("d", "qk", 4, tie="2")
    values = [tied_group("cv", "vo", 4, tie="1"), tied_group("dv", "vo", 4, tie="2")]
    groups = [cheap, dear, *values]
    curves = {"c": 3.0, "cv": 1.0, "d": 1.0, "dv": 4.0}
    made = scores({g.id: np.ones((2, 4)) for g in groups}, *groups)
    made = replace(made, curves={n: c * np.linspace(1, 0, 5) for n, c in curves.items()})
    widths = allocate_widths(groups, made, snpc.Budget(0.5))
    assert widths["c"] == widths["cv"] < widths["d"] == widths["dv"]


@pytest.mark.parametrize("chosen", [[PAIRS], [VALUES, FREE]])
def test_a_part_of_a_tie_is_refused(chosen: list[Group]) -> None:
    with pytest.raises(snpc.UserError, match="takes one head size"):
        check_ties_are_whole(chosen, [PAIRS, VALUES, FREE], "m.onnx")


@pytest.mark.parametrize("chosen", [[FREE], [PAIRS, VALUES], []])
def test_a_whole_tie_or_none_is_fine(chosen: list[Group]) -> None:
    check_ties_are_whole(chosen, [PAIRS, VALUES, FREE], "m.onnx")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"k": 24, "v": 32}, "keeps 48 channels per head and v 32"),
        ({"k": 24}, "and v 64"),
        ({"k": 23}, "multiples of 8"),
    ],
)
def test_plans_by_hand_keep_widths_that_kernels_take(kept: dict[str, int], words: str) -> None:
    with pytest.raises(snpc.UserError, match=words):
        check_kept_widths(kept, [PAIRS, VALUES, FREE], "plan.json")
    check_kept_widths({"k": 24, "v": 48, "f": 3}, [PAIRS, VALUES, FREE], "plan.json")
