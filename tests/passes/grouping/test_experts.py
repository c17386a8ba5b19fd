"""Mixtures of experts: hidden widths and whole experts, in the forms that exporters write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from snpc.graph import infer_graph
from snpc.types import Group
from tests.models.experts import CHOSEN, COUNT, EXPERTS, HIDDEN, fused_model, longer_feeds
from tests.models.exports import export
from tests.oracle import (
    TOLERANCE,
    analysis_at,
    analysis_of,
    cut,
    cuts_of,
    feeds_of,
    prunable,
    random_cuts,
    relative_error,
    run,
)

NAMES = list(EXPERTS)
UNROLLED = [name for name in NAMES if name.startswith("unrolled")]
STACKED = [name for name in NAMES if name not in UNROLLED]
WITHOUT_GROUPS = [name for name in NAMES if not name.startswith("deepseek")]


def experts_of(name: str) -> list[Group]:
    return [g for g in analysis_of(name).groups if g.role == "experts"]


@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_widths_and_experts_are_found(name: str) -> None:
    groups = analysis_of(name).groups
    found = Counter((g.role, g.blocks, g.size) for g in groups if g.prunable and g.role in ("ffn", "experts"))
    widths = 2 if name in STACKED else 2 * COUNT
    shared = {("ffn", 1, 28): 2} if name.startswith("qwen2moe") else {}
    assert found == Counter({("experts", 1, COUNT): 2, ("ffn", 1, HIDDEN): widths, **shared})
    assert {g.least for g in groups if g.role == "experts"} == {CHOSEN}


@pytest.mark.parametrize("roles", [("ffn",), ("experts",), ("ffn", "experts"), ("qk", "vo", "ffn", "experts")])
@pytest.mark.parametrize("name", NAMES)
def test_sliced_equals_masked(name: str, roles: tuple[str, ...]) -> None:
    analysis = analysis_of(name)
    groups = prunable(analysis.groups, *roles)
    if not groups:
        assert name.startswith("deepseek") and roles == ("experts",)
        return
    pair = cut(analysis, random_cuts(groups, seed=len(name)))
    for feeds in (feeds_of(name), longer_feeds()):
        assert pair.error(feeds) <= TOLERANCE
        assert pair.error(feeds, "all") <= TOLERANCE
        assert relative_error(pair.expected(feeds), run(export(name), feeds)) > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("qwen3moe") or n in UNROLLED])
def test_cut_experts_equal_a_model_that_never_had_them(name: str) -> None:
    """Of torch's own model the experts are deleted, the router's rows with them."""
    import torch

    kept = np.array([0, 2, 3, 5])
    removed = np.ones((1, COUNT), bool)
    removed[0, kept] = False
    pair = cut(analysis_of(name), cuts_of((g, removed) for g in experts_of(name)))
    module = EXPERTS[name].build().module
    delete_experts(module, kept.tolist())
    feeds = feeds_of(name)
    with torch.no_grad():
        expected = module(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    assert relative_error([expected], run(pair.sliced, feeds)) <= 1e-4


def delete_experts(module: Any, kept: list[int]) -> None:
    from torch import nn

    for layer in module.modules():
        kind = type(layer).__name__
        if isinstance(getattr(layer, "experts", None), nn.ModuleList):
            layer.experts = nn.ModuleList([layer.experts[k] for k in kept])
            layer.gate.weight = nn.Parameter(layer.gate.weight[kept], requires_grad=False)
        elif hasattr(layer, "gate_up_proj") or kind.endswith("TopKRouter"):
            layer.num_experts = len(kept)
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter[kept], requires_grad=False))


@pytest.mark.parametrize("name", ["deepseek__dyn20"])
def test_experts_in_groups_stay_and_their_widths_go(name: str) -> None:
    """Groups of experts are compared first: which experts are left in each would change the choice."""
    (experts,) = experts_of(name)
    assert not experts.prunable
    assert Counter(g.size for g in prunable(analysis_of(name).groups, "ffn"))[HIDDEN] == 2  # routed, and shared


@pytest.mark.parametrize("name", UNROLLED)
def test_a_count_of_tokens_is_a_free_size(name: str) -> None:
    """No shape is unknown where the tokens of an expert are found by NonZero, and no run of the graph is needed."""
    traced = analysis_of(name).traced_graph
    facts = infer_graph(traced.model, traced.dim_sizes, measure=False)
    assert all(facts.shape.get(v) is not None for node in traced.model.graph for v in node.outputs if v.name)


@pytest.mark.parametrize("name", UNROLLED)
def test_weights_of_an_expert_of_its_own_count_as_its_parameters(name: str) -> None:
    group = experts_of(name)[0]
    width = 48
    assert [len(names) for names in group.owned] == [3] * COUNT
    assert group.params == COUNT * (width + 3 * width * HIDDEN)


class TestOneNode:
    """com.microsoft.MoE, which onnxruntime runs on the CPU with these activations, and no gate of its own."""

    @pytest.mark.parametrize("activation", ["relu", "silu", "swiglu"])
    def test_sliced_equals_masked(self, activation: str, tmp_path: Path) -> None:
        analysis = analysis_at(tmp_path / "moe.onnx", fused_model(activation))
        found = {g.role: (g.blocks, g.size, g.least) for g in analysis.groups if g.prunable and g.role != "other"}
        assert found["experts"] == (1, COUNT, CHOSEN)
        sizes = Counter((g.role, g.size) for g in analysis.groups if g.prunable)
        assert sizes["ffn", HIDDEN] == 1
        feeds = {"x": np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)}
        for roles in (("ffn",), ("experts",), ("ffn", "experts")):
            pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), seed=3))
            assert pair.error(feeds) <= TOLERANCE
            assert relative_error(pair.expected(feeds), run(tmp_path / "moe.onnx", feeds)) > 1e-3

    def test_products_are_counted_for_the_chosen_experts(self, tmp_path: Path) -> None:
        analysis = analysis_at(tmp_path / "moe.onnx", fused_model("relu"))
        tokens = analysis.dim_sizes["tokens"]
        one = 2 * 12 * HIDDEN
        assert analysis.cost.macs == tokens * (CHOSEN * one + 2 * 8 * 12 + 12 * COUNT)
        (hidden,) = [g for g in analysis.groups if g.role == "ffn" and g.size == HIDDEN]
        assert hidden.macs == tokens * CHOSEN * one

    def test_weights_that_do_not_fit_are_pinned(self, tmp_path: Path) -> None:
        model = fused_model("relu")
        del model.graph.node[3].attribute[:]
        model.graph.node[3].attribute.append(onnx.helper.make_attribute("swiglu_fusion", 1))
        analysis = analysis_at(tmp_path / "moe.onnx", model)
        assert not prunable(analysis.groups, "experts")
        assert any("do not fit" in pin.reason for pin in analysis.pins)
