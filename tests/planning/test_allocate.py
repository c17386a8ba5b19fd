"""From scores to widths to lists of units: what ``--ratio`` means, and the plan as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import snpc
from snpc.passes.analyze import Analysis
from snpc.planning.allocate import groups_to_prune, removal_costs
from snpc.planning.config import allowed_widths
from snpc.planning.descent import convex_hull_steps
from snpc.planning.plan import cuts_of, top_units
from snpc.planning.plan_file import parse_kept_units
from snpc.types import Cost, Group, Role, Site
from tests.command_line import VIT
from tests.models.groups import make_group

Array = npt.NDArray[Any]


def analysis(*groups: Group) -> Analysis:
    """As much of an analysis as planning looks at."""
    model = SimpleNamespace(path=Path("made.onnx"), digest="d" * 64)
    traced_graph = SimpleNamespace(kv_cache=False)
    cost = Cost(1, 1, 1, 1)
    parts = {"groups": groups, "pins": (), "model": model, "traced_graph": traced_graph, "cost": cost}
    none = {"reduction": None, "removal": None, "metrics": {}, "stream_bases": (), "shared_products": (), "entries": ()}
    return cast(Analysis, SimpleNamespace(**parts, **none))


def scores(values: Mapping[str, Array], *groups: Group) -> snpc.UnitScores:
    return snpc.UnitScores(analysis(*groups), "made", {k: np.asarray(v, np.float64) for k, v in values.items()})


def random_scores(groups: list[Group], seed: int) -> snpc.UnitScores:
    rng = np.random.default_rng(seed)
    return scores({g.id: rng.random((g.blocks, g.size)) * 10 ** rng.uniform(-3, 3) for g in groups}, *groups)


def removed(plan: snpc.SlicePlan, groups: list[Group]) -> int:
    return sum(g.blocks * (g.size - plan.kept_width(g)) for g in groups)


GROUPS = st.lists(st.tuples(st.sampled_from(["qk", "vo", "ffn", "head"]), st.integers(1, 6), st.integers(2, 40)),
                  min_size=1, max_size=6)  # fmt: skip


class TestWidths:
    @settings(max_examples=150, deadline=None)
    @given(
        GROUPS, st.floats(0, 0.99), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12), st.booleans(), st.integers(0, 9)
    )
    def test_every_option_holds(
        self, shapes: list[tuple[Role, int, int]], ratio: float, step: int, least: int, uniform: bool, seed: int
    ) -> None:
        groups = [make_group(f"g{k}", *shape) for k, shape in enumerate(shapes)]
        roles = tuple(dict.fromkeys(g.role for g in groups))
        made = random_scores(groups, seed)
        plan = snpc.make_slice_plan(made, snpc.Budget(ratio, roles, uniform=uniform, round_to=step, min_width=least))
        for g in groups:
            width = plan.kept_width(g)
            assert 1 <= width <= g.size
            assert width == g.size or (width % step == 0 and width >= min(least, g.size))
            rows = plan.keep.get(g.id, ())
            assert len(rows) in (0, g.blocks)
            for row, values in zip(rows, made.values[g.id], strict=False):
                assert list(row) == sorted(set(row))
                assert len(row) == width
                gone = np.setdiff1d(np.arange(g.size), row)
                assert values[list(row)].min() >= values[gone].max(initial=-np.inf)
        for role in roles:
            mine = [g for g in groups if g.role == role]
            if uniform:
                for g in mine:
                    nearest = min(
                        abs(w - g.size * (1 - ratio))
                        for w in allowed_widths(g, snpc.Budget(0, (role,), round_to=step, min_width=least))
                    )
                    assert abs(plan.kept_width(g) - g.size * (1 - ratio)) == pytest.approx(nearest)
            else:
                assert removed(plan, mine) <= ratio * sum(g.blocks * g.size for g in mine) + 1e-6

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(8, 64), min_size=1, max_size=5), st.integers(1, 5), st.floats(0, 0.9), st.integers(0, 9)
    )
    def test_as_much_goes_as_fits(self, sizes: list[int], blocks: int, ratio: float, seed: int) -> None:
        """With heads alike, less than one step remains of what may go (unless a group is down to one unit)."""
        groups = [make_group(f"g{k}", "qk", blocks, size) for k, size in enumerate(sizes)]
        plan = snpc.make_slice_plan(random_scores(groups, seed), snpc.Budget(ratio, ("qk",)))
        budget = ratio * sum(blocks * size for size in sizes)
        if all(plan.kept_width(g) > 1 for g in groups):
            assert budget - removed(plan, groups) < blocks

    def test_ranking_cuts_where_scores_are_low(self) -> None:
        flat, steep = make_group("flat", "ffn", 1, 10), make_group("steep", "ffn", 1, 10)
        values = {"flat": np.ones((1, 10)), "steep": np.array([[1e-3] * 5 + [2] * 5])}
        plan = snpc.make_slice_plan(scores(values, flat, steep), snpc.Budget(0.25, ("ffn",)))
        assert (plan.kept_width(flat), plan.kept_width(steep)) == (10, 5)
        assert plan.keep["steep"] == ((5, 6, 7, 8, 9),)

    def test_ranking_is_by_share_of_the_group(self) -> None:
        """A layer whose scores are a thousand times larger is not spared for that."""
        one, other = make_group("one", "ffn", 1, 20), make_group("other", "ffn", 1, 20)
        values = np.random.default_rng(0).random((1, 20))
        made = scores({"one": values, "other": 1000 * values}, one, other)
        plan = snpc.make_slice_plan(made, snpc.Budget(0.5, ("ffn",)))
        assert plan.keep["one"] == plan.keep["other"]
        assert plan.kept_width(one) == 10

    def test_roles_have_their_own_budget(self) -> None:
        groups = [make_group("a", "qk", 2, 10), make_group("b", "vo", 2, 10), make_group("c", "ffn", 1, 50)]
        values = {"a": np.full((2, 10), 1e-6), "b": np.full((2, 10), 1e6), "c": np.ones((1, 50))}
        plan = snpc.make_slice_plan(scores(values, *groups), snpc.Budget(0.3))
        assert [plan.kept_width(g) for g in groups] == [7, 7, 35]

    def test_blocks_lose_equally_many_but_not_the_same(self) -> None:
        g = make_group("a", "qk", 2, 4)
        made = scores({"a": np.array([[1, 2, 3, 4], [4, 3, 2, 1]])}, g)
        assert snpc.make_slice_plan(made, snpc.Budget(0.5, ("qk",))).keep["a"] == ((2, 3), (0, 1))

    def test_ties_go_to_the_lower_position(self) -> None:
        assert top_units(np.ones((2, 5)), 3) == ((0, 1, 2), (0, 1, 2))

    @pytest.mark.parametrize("values", [np.zeros((2, 8)), np.full((2, 8), 5.0)])
    def test_scores_that_say_nothing(self, values: Array) -> None:
        g = make_group("a", "qk", 2, 8)
        assert snpc.make_slice_plan(scores({"a": values}, g), snpc.Budget(0.5, ("qk",))).kept_width(g) == 4

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 40), st.integers(1, 4), st.sampled_from([1, 3, 8]), st.integers(0, 9))
    def test_a_ladder_rises(self, size: int, blocks: int, step: int, seed: int) -> None:
        g = make_group("a", "qk", blocks, size)
        losses = {g.id: removal_costs(random_scores([g], seed), g)}
        rungs = convex_hull_steps([g], losses, snpc.Budget(0.5, round_to=step))
        costs, widths = [c for c, _ in rungs], [w for _, (w,) in rungs]
        assert costs == sorted(costs)
        assert [size, *widths] == allowed_widths(g, snpc.Budget(0.5, round_to=step))


class TestChosen:
    def test_pinned_and_single_units_stay(self) -> None:
        groups = [make_group("a", "ffn", 1, 8, pinned=True), make_group("b", "ffn", 1, 8), make_group("c", "ffn", 4, 1)]
        assert [g.id for g in groups_to_prune(analysis(*groups), snpc.Budget(0.5))] == ["b"]

    def test_patterns_are_searched_in_ids(self) -> None:
        made = analysis(*(make_group(f"layer.{k}.mlp.ffn", "ffn", 1, 8) for k in (1, 2, 10)))
        for include, exclude, expected in (
            (r"\.1\.", None, ["1"]), ("1", None, ["1", "10"]), (None, "1", ["2"]), ("1", "10", ["1"]),
        ):  # fmt: skip
            found = groups_to_prune(made, snpc.Budget(0.5, include=include, exclude=exclude))
            assert [g.id.split(".")[1] for g in found] == expected

    @pytest.mark.parametrize(
        "groups, options, words",
        [
            ([make_group("a", "ffn", 1, 8, pinned=True)], {}, r"a\.w axis 0: it is held \(Hold h\)"),
            ([make_group("a", "ffn", 1, 8)], {"roles": ("qk",)}, "nothing to prune in the roles qk"),
            ([make_group("a", "ffn", 1, 8)], {"exclude": "a"}, "leave no group"),
            ([], {}, "nothing to prune"),
        ],
        ids=["pinned", "role", "excluded", "none"],
    )
    def test_refusals(self, groups: list[Group], options: dict[str, Any], words: str) -> None:
        with pytest.raises(snpc.UserError, match=words):
            groups_to_prune(analysis(*groups), snpc.Budget(0.5, **options))


def test_cuts_are_by_constant_and_axis() -> None:
    g = make_group("a", "qk", 2, 3)
    plan = snpc.SlicePlan(analysis(g), "made", {}, {"a": ((0, 2), (1, 2))})
    found = cuts_of(plan)
    assert set(found) == {("a.w", 0), ("a.v", 1)}
    assert found["a.w", 0].tolist() == [False, True, False, True, False, False]
    assert found["a.v", 1].tolist() == [False, True, False, True, False, False, False]  # the last is no unit


def test_a_constant_of_two_groups_loses_both() -> None:
    """A packed weight: its first half belongs to one group, its second to another."""
    units = np.arange(4)
    a = Group("a", "qk", 0, 1, 4, (Site("w", 1, "produce", np.append(units, [-1] * 4)),), (), "basis", "", 1, 1)
    b = Group("b", "vo", 0, 1, 4, (Site("w", 1, "produce", np.append([-1] * 4, units)),), (), "basis", "", 1, 1)
    plan = snpc.SlicePlan(analysis(a, b), "made", {}, {"a": ((0, 1),), "b": ((3,),)})
    assert np.flatnonzero(cuts_of(plan)["w", 1]).tolist() == [2, 3, 4, 5, 6]


class TestFile:
    @settings(max_examples=40, deadline=None)
    @given(GROUPS, st.floats(0, 0.9), st.integers(0, 9))
    def test_there_and_back(self, shapes: list[tuple[Role, int, int]], ratio: float, seed: int) -> None:
        groups = [make_group(f"g{k}", *shape) for k, shape in enumerate(shapes)]
        roles = tuple(dict.fromkeys(g.role for g in groups))
        plan = snpc.make_slice_plan(random_scores(groups, seed), snpc.Budget(ratio, roles))
        again = snpc.plan_from_json(snpc.plan_to_json(plan), plan.analysis, "p.json")
        assert again.keep == plan.keep
        assert again.criterion == plan.criterion
        assert json.loads(json.dumps(again.options)) == json.loads(json.dumps(plan.options))
        assert snpc.plan_to_json(again) == snpc.plan_to_json(plan)

    def test_is_read_by_people(self) -> None:
        made = snpc.analyze(snpc.load(VIT))
        text = snpc.plan_to_json(snpc.make_slice_plan(snpc.score(made, "magnitude"), snpc.Budget(0.9, ("qk",))))
        data = json.loads(text)
        assert (data["snpc_plan"], data["model"], data["criterion"]) == (1, "digits_vit.onnx", "magnitude")
        assert data["options"]["ratio"] == 0.9
        assert len(data["groups"]) == 4
        assert max(map(len, text.splitlines())) < 120
        assert text.count("\n") < 60

    def test_order_does_not_matter(self) -> None:
        assert parse_kept_units([[2, 0], [1, 3]], make_group("a", "qk", 2, 4), "p") == ((0, 2), (1, 3))

    def test_the_models_name_does_not_matter_but_its_content_does(self, tmp_path: Path) -> None:
        made = snpc.analyze(snpc.load(VIT))
        text = snpc.plan_to_json(snpc.make_slice_plan(snpc.score(made, "magnitude"), snpc.Budget(0.5)))
        (tmp_path / "renamed.onnx").write_bytes(VIT.read_bytes())
        renamed = snpc.analyze(snpc.load(tmp_path / "renamed.onnx"))
        assert snpc.plan_from_json(text, renamed, "p.json").keep
        (tmp_path / "changed.onnx").write_bytes(VIT.read_bytes().replace(b"blocks.0.mlp", b"blocks.0.MLP"))
        changed = snpc.analyze(snpc.load(tmp_path / "changed.onnx"))
        with pytest.raises(snpc.UserError, match="another model"):
            snpc.plan_from_json(text, changed, "p.json")


# -- caps and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"ratio": 0.8}, {"ratio": 0.8, "uniform": True}, {"target": "params=0.6"}])
def test_no_group_loses_more_than_its_cap(how: dict[str, Any]) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    plan = snpc.make_slice_plan(
        snpc.score(analysis, "magnitude"), snpc.Budget(**how, max_ratio="ffn=0.9,qk=0.25,vo=0.5")
    )
    caps = {"ffn": 0.9, "qk": 0.25, "vo": 0.5}
    cut = [g for g in analysis.groups if g.id in plan.keep]
    assert cut
    for group in cut:
        assert plan.kept_width(group) >= group.size * (1 - caps[group.role]) - 1e-9
    assert any(plan.kept_width(g) == g.size * 0.75 for g in cut if g.role == "qk")


@pytest.mark.parametrize("text", ["1", "-0.1", "half", "ffn", "ffn=2", "nothing=0.5", "0.5,0.4", ""])
def test_caps_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(snpc.UserError, match="must look like"):
        snpc.Budget(ratio=0.5, max_ratio=text)


def test_bytes_come_down_to_the_target(tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    plan = snpc.make_slice_plan(snpc.score(analysis, "magnitude"), snpc.Budget(target="bytes=0.6"))
    result = snpc.apply(snpc.PruningPlan(plan), tmp_path / "cut.onnx")
    weights = snpc.analyze(snpc.load(result.path)).cost.bytes
    assert 0.55 < weights / analysis.cost.bytes <= 0.6
