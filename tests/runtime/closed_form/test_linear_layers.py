"""Rotations beyond one attention layer: messages that are concatenated to a stream, and projections that two streams
share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.weights import WeightEdits, apply_edits
from snpc.passes.weights.attention_operands import score_products
from snpc.pipeline.planner import PruningPlan
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.fit import ROTATED, apply_basis
from snpc.types import Group
from tests.closed_forms import (
    analyzed_bytes,
    calibration_of,
    closed_forms_on,
    pruned_bytes,
    random_feeds,
    relative_change,
    tensor_values,
)
from tests.models.exports import export
from tests.models.hidden_norms import POINTS
from tests.oracle import (
    TOLERANCE,
    analysis_at,
    analysis_of,
    cut,
    feeds_of,
    prunable,
    random_cuts,
    relative_error,
    run,
    written,
)

MATCHER = "matcher__ts17"


def messages(analysis: Analysis) -> list[Group]:
    return [g for g in prunable(analysis.groups, "ffn") if g.size == POINTS]


def keeping(analysis: Analysis, group: Group, kept: int) -> SlicePlan:
    return SlicePlan(analysis, "", {}, {group.id: (tuple(range(kept)),) * group.blocks}, "parallel")


@pytest.mark.parametrize("name", [MATCHER, "matcher__dyn20"])
def test_messages_have_a_free_basis(name: str) -> None:
    """Nothing but a concatenation lies between the layer that makes a message and the one that reads it."""
    found = messages(analysis_of(name))
    assert len(found) == 2
    assert {g.freedom for g in found} == {"basis"}


def test_everything_in_a_matcher_is_rotated() -> None:
    analysis = analysis_of(MATCHER)
    kinds = {g.id: analysis.weights[g.id].kind for g in prunable(analysis.groups, "qk", "vo")}
    assert set(kinds.values()) == {"low_rank_qk", "low_rank_vo"}
    assert {analysis.weights[g.id].kind for g in messages(analysis)} == {"low_rank_vo"}


def test_a_change_of_basis_alone_changes_nothing() -> None:
    analysis, feeds, edits = analysis_of(MATCHER), random_feeds(MATCHER, 8), WeightEdits()
    groups = [*prunable(analysis.groups, "qk", "vo"), *messages(analysis)]
    found = closed_forms_on(MATCHER, feeds, groups)
    assert {found.kinds[g.id] for g in groups} == set(ROTATED)
    for group in groups:
        apply_basis(edits, found, group)
    model = written(apply_edits(analysis.traced_graph, edits))
    assert relative_error(run(export(MATCHER), feeds), run(model, feeds)) < 1e-4
    assert analysis.weights[next(g.id for g in groups if g.id.startswith("cross.qk"))].projects_both_alike


@pytest.mark.parametrize("kept", [4, 8, 16])
def test_predicted_loss_of_messages(kept: int) -> None:
    """What the layer behind the concatenation gives, for both streams."""
    analysis, feeds = analysis_of(MATCHER), random_feeds(MATCHER, 12)
    for group in messages(analysis):
        found = closed_forms_on(MATCHER, feeds, [group])
        model = pruned_bytes(PruningPlan(keeping(analysis, group, kept), found))
        (consumer,) = analysis.weights[group.id].consumers
        names = [str(next(iter(node.outputs[0].consumers())).outputs[0].name) for node in consumer.nodes]
        assert len(names) == 2
        before, after = (tensor_values(proto, names, feeds) for proto in (analyzed_bytes(MATCHER), model))
        measured = sum(float(np.sum((a - b) ** 2)) for a, b in zip(before, after, strict=True))
        curve = found.loss_curve(group)
        assert curve is not None
        assert measured == pytest.approx(curve[kept], rel=1e-2)
        assert measured > 1e-4 * curve[0]


@pytest.mark.parametrize("kept", [3, 8, 13])
def test_predicted_loss_of_scores_with_one_projection(kept: int) -> None:
    analysis, feeds = analysis_of(MATCHER), random_feeds(MATCHER, 1)
    shared = [g for g in prunable(analysis.groups, "qk") if analysis.weights[g.id].projects_both_alike]
    assert len(shared) == 2
    for group in shared:
        found = closed_forms_on(MATCHER, feeds, [group])
        model = pruned_bytes(PruningPlan(keeping(analysis, group, kept), found))
        (product,) = score_products(analysis.traced_graph, group)
        scores = [str(product.node.outputs[0].name)]
        (before,), (now,) = (tensor_values(proto, scores, feeds) for proto in (analyzed_bytes(MATCHER), model))
        gap = now - before
        measured = float(np.sum((gap - gap.mean(-1, keepdims=True)) ** 2))
        curve = found.loss_curve(group)
        assert curve is not None
        assert measured == pytest.approx(curve[kept], rel=1e-2)


@pytest.mark.parametrize("name", [MATCHER, "matcher__dyn20"])
def test_less_moves_than_by_selection(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data, others = calibration_of(analysis, random_feeds(name, 48), 16), random_feeds(name, 16, 7)
    moves = {}
    for method in ("auto", "select"):
        made = snpc.plan(
            analysis, snpc.Budget(0.25, uniform=True), calibration=data, method=method, criterion="activation"
        )
        result = snpc.apply(made, tmp_path / "p.onnx")
        moves[method] = relative_change(run(export(name), others), run(result.path, others))
    assert moves["auto"] < 0.8 * moves["select"]


@pytest.mark.parametrize("name", [MATCHER, "matcher__dyn20"])
def test_slicing_equals_masking(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    pair = cut(analysis, random_cuts(prunable(analysis.groups, "qk", "vo", "ffn"), 5))
    for level in ("off", "all"):
        assert pair.error(feeds, level) < TOLERANCE


# -- what is no linear layer -------------------------------------------------------------------------------------------

TEXT = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[B, N, 6] x) => (float[B, N, 5] y) <float slope = {0.1}> {
        a = MatMul(x, w1)
        BETWEEN
        c = Concat <axis = -1> (x, b)
        y = MatMul(c, w2)
    }"""
BETWEEN = {
    "nothing": ("b = Identity(a)", "basis", "low_rank_vo"),
    "a bias": ("b = Add(a, bias)", "basis", "low_rank_vo"),
    "a gain": ("b = Mul(a, gain)", "select", "refit"),
    "an activation": ("b = Relu(a)", "select", "refit"),
    "a gate": ("s = MatMul(x, w3) b = Mul(a, s)", "select", "refit"),
    "another reader": ("b = Identity(a) t = MatMul(a, w4) k = Relu(t) u = MatMul(k, w5)", "basis", "refit"),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_lies_between(case: str, tmp_path: Path) -> None:
    between, freedom, kind = BETWEEN[case]
    shapes = {"w1": (6, 8), "w2": (14, 5), "w3": (6, 8), "w4": (8, 7), "w5": (7, 5), "bias": (8,), "gain": (8,)}
    text = TEXT.replace("BETWEEN", between)
    if "u =" in text:
        text = text.replace("y = MatMul(c, w2)", "v = MatMul(c, w2) y = Add(u, v)")
    model = parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    rng = np.random.default_rng(0)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
        if name in used
    )
    analysis = analysis_at(tmp_path / "m.onnx", model)
    group = next(g for g in analysis.groups if g.size == 8)
    assert (group.role, group.freedom, analysis.weights[group.id].kind) == ("ffn", freedom, kind)
