"""Norms on the heads of queries and keys: gains fitted to the scores, tried as they are cut, and named everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import snpc
from snpc.passes.analyze import Analysis
from snpc.runtime.closed_form.elimination import eliminate
from snpc.runtime.closed_form.masked_weights import changed_constants
from snpc.runtime.closed_form.normalizations_inside import score_factors, score_systems
from snpc.runtime.execution import SpillableStore
from snpc.runtime.sensitivity.loss_curves import trial_constants, trial_edits
from snpc.runtime.sensitivity.segmented_model import open_segmented_model
from tests.closed_forms import (
    calibration_of,
    pruned_bytes,
    random_feeds,
    relative_change,
    tensor_values,
)
from tests.command_line import invoke, reported
from tests.models.builder_decoders import BuilderDecoder
from tests.models.exports import VOCABULARY, export
from tests.models.head_norms import HEAD_NORMS, HEAD_WIDTH, HeadNorms
from tests.models.normalized_decoders import NORMALIZED_DECODERS
from tests.oracle import (
    TOLERANCE,
    Array,
    Feeds,
    analysis_at,
    analysis_of,
    feeds_of,
    prunable,
    relative_error,
    require,
    run,
)

FITTED = {name: form for name, form in HEAD_NORMS.items() if form.gain}
ROOT_MEAN_SQUARES = {name: form for name, form in FITTED.items() if form.form != "LayerNormalization"}


def solved(analysis: Analysis, feeds: Feeds) -> snpc.ClosedForms:
    groups, data = prunable(analysis.groups, "qk"), calibration_of(analysis, dict(feeds), 16)
    return snpc.solve_closed_forms(analysis, snpc.measure_statistics(analysis, data, groups), groups)


def score_terms(path: Path, feeds: Feeds, size: int) -> Array:
    """[units, entries]: what each unit adds to every score, less the mean over keys."""
    query, key = tensor_values(path.read_bytes(), ["q4", "kr"], dict(feeds))
    terms = np.einsum("bhqd,bhkd->dbhqk", query.astype(np.float64), key)
    terms = (terms - terms.mean(-1, keepdims=True)).reshape(HEAD_WIDTH // size, size, -1)
    return np.asarray(terms.sum(0)) if size < HEAD_WIDTH else terms[0]


def half(analysis: Analysis, found: snpc.ClosedForms) -> snpc.PruningPlan:
    """Every group of queries and keys at half its width."""
    keep = {}
    for group_id, orders in found.elimination_orders.items():
        width = analysis.group(group_id).size // 2
        keep[group_id] = tuple(tuple(sorted(order.order[-width:].tolist())) for order in orders)
    return snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, keep, "parallel"), found)


# -- the closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [HeadNorms(), HeadNorms(rotary=False), HeadNorms("LayerNormalization")])
def test_factors_and_loss_are_those_of_least_squares_on_the_scores(form: HeadNorms, tmp_path: Path) -> None:
    path, feeds = tmp_path / "m.onnx", form.feeds(64)
    analysis = analysis_at(path, form.model())
    (group,), found = prunable(analysis.groups, "qk"), solved(analysis, feeds)
    moments, terms = found.moments[group.id], score_terms(path, feeds, group.size)
    whole = terms.sum(0)
    order = eliminate(score_systems(analysis, group, moments, 0)[:1], group.size)
    for width in range(1, group.size):
        kept = np.sort(order.order[-width:])
        expected, residual, *_ = np.linalg.lstsq(terms[kept].T, whole, rcond=None)
        factors = score_factors(moments.score_losses[0], [kept.tolist()], 1e9)
        np.testing.assert_allclose(factors, expected, rtol=5e-3, atol=5e-3)
        assert order.loss[width] == pytest.approx(float(residual[0]), rel=2e-2)


@pytest.mark.parametrize("form", ROOT_MEAN_SQUARES.values(), ids=ROOT_MEAN_SQUARES.keys())
def test_channels_that_are_nil_go_without_a_loss(form: HeadNorms, tmp_path: Path) -> None:
    """The gain makes up for the mean over fewer channels."""
    model = form.model()
    nil = [1, 2, 5, 6]  # whole pairs
    for tensor in model.graph.initializer:
        if tensor.name in ("wq", "wk"):
            array = numpy_helper.to_array(tensor).copy().reshape(16, -1, HEAD_WIDTH)
            array[:, :, nil] = 0
            tensor.CopyFrom(numpy_helper.from_array(array.reshape(16, -1), tensor.name))
    path, feeds = tmp_path / "m.onnx", form.feeds(32)
    analysis = analysis_at(path, model)
    made = half(analysis, solved(analysis, feeds))
    unfitted = snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, made.slices.keep, "select"))
    original = run(path, feeds)
    assert relative_error(original, run(pruned_bytes(made), feeds)) < 5 * TOLERANCE  # sums are in single precision
    assert relative_error(original, run(pruned_bytes(unfitted), feeds)) > 1e-2


@pytest.mark.parametrize("form", FITTED.values(), ids=FITTED.keys())
def test_a_fitted_gain_moves_the_scores_less(form: HeadNorms, tmp_path: Path) -> None:
    path, others = tmp_path / "m.onnx", form.feeds(64, 9)
    analysis = analysis_at(path, form.model())
    made = half(analysis, solved(analysis, form.feeds(64)))
    unfitted = snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, made.slices.keep, "select"))

    def scores(model: bytes) -> list[Array]:
        """Less the mean over keys, which a softmax does not see."""
        (found,) = tensor_values(model, ["s"], others)
        return [found - found.mean(-1, keepdims=True)]

    original = scores(path.read_bytes())
    moved, without = (relative_change(original, scores(pruned_bytes(plan))) for plan in (made, unfitted))
    assert moved < 0.98 * without


@pytest.mark.parametrize("form", FITTED.values(), ids=FITTED.keys())
def test_the_gain_of_the_queries_is_fitted_to_the_scores(form: HeadNorms, tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", form.model())
    (group,) = prunable(analysis.groups, "qk")
    weights = analysis.weights[group.id]
    assert weights.kind == "score_refit"
    assert {norm.gain: norm.products for norm in weights.normalizations} == {"q_gain": (0,), "k_gain": ()}
    assert [norm.bias for norm in weights.normalizations] == (
        ["q_bias", "k_bias"] if form.form == "LayerNormalization" else [None, None]
    )


def test_each_layer_of_a_real_model_has_gains_of_its_own() -> None:
    analysis = analysis_of("qwen3__ts17")
    groups = prunable(analysis.groups, "qk")
    found = [(norm.gain, norm.products) for g in groups for norm in analysis.weights[g.id].normalizations]
    names = [(gain.removeprefix("model.model.layers.").removesuffix(".weight"), products) for gain, products in found]
    assert names == [
        (f"{layer}.self_attn.{norm}", products)
        for layer in (0, 1)
        for norm, products in (("q_norm", (0,)), ("k_norm", ()))
    ]


def test_without_a_gain_nothing_is_fitted(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", HeadNorms(rotary=False, gain=False).model())
    (group,) = prunable(analysis.groups, "qk")
    assert analysis.weights[group.id].kind == "score_selection"


# -- trials are what will be cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEAD_NORMS)
def test_a_trial_is_the_model_that_is_written(name: str, tmp_path: Path) -> None:
    path, feeds = tmp_path / "m.onnx", HEAD_NORMS[name].feeds(16)
    analysis = analysis_at(path, HEAD_NORMS[name].model())
    (group,), found = prunable(analysis.groups, "qk"), solved(analysis, feeds)
    orders, width = found.elimination_orders[group.id], group.size // 2
    scores = snpc.UnitScores(analysis, "", {group.id: np.array([np.argsort(order.order) for order in orders])})
    changed = {group.id: changed_constants(analysis.traced_graph, *trial_edits(found, scores, group, width))}
    with open_segmented_model(analysis, changed) as model:
        dense = model.dense_states(feeds, SpillableStore(1 << 30))
        tried = model.outputs_with(dense, group.id, trial_constants(found, scores, group, width))
    written = run(pruned_bytes(half(analysis, found)), feeds)
    assert relative_error(run(path, feeds), written) > 1e-3
    assert relative_error(written, [tried["y"]]) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3__ts17", "vit_timm_qknorm__ts17"])
def test_the_planner_cuts_them_by_measured_curves(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data = calibration_of(analysis, random_feeds(name, 32), 8)
    made = snpc.plan(analysis, snpc.Budget(target="macs=0.6"), calibration=data)
    groups = prunable(analysis.groups, "qk")
    assert groups
    assert all(np.isfinite(made.loss_curves[g.id]).all() and made.loss_curves[g.id][0] > 0 for g in groups)
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert {result.closed_forms[g.id] for g in groups} == {"score_refit"}
    equal = result.verification.max_abs_diff
    assert equal is not None
    assert equal < 1e-4


# -- caches ----------------------------------------------------------------------------------------------------------


def check_cut_with_caches(path: Path, feeds: Feeds, folder: Path) -> None:
    """Queries and keys are fitted and cut to half with their caches. ``apply`` compares the file with the masked model
    and decoding step by step with decoding at once, and refuses what differs."""
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    data = calibration_of(analysis, dict(feeds), 4)
    made = snpc.plan(analysis, snpc.Budget(0.5, ("qk", "vo"), uniform=True), data)
    result = snpc.apply(made, folder / "out.onnx")
    groups = prunable(analysis.groups, "qk")
    assert groups
    assert {result.closed_forms[group.id] for group in groups} == {"score_refit"}
    assert result.cache_bytes[1] * 2 == result.cache_bytes[0]
    assert any("step by step" in check for check in result.verification.structure)
    equal = result.verification.max_abs_diff
    assert equal is not None
    assert equal < 1e-5


@pytest.mark.parametrize("name", NORMALIZED_DECODERS)
def test_decoders_with_caches_are_cut(name: str, tmp_path: Path) -> None:
    require(name)
    caches = {
        key: np.zeros((8, *value.shape[1:2], 0, *value.shape[3:]), value.dtype)
        for key, value in feeds_of(name).items()
        if value.ndim == 4
    }
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (8, 9))
    check_cut_with_caches(export(name), {"input_ids": ids, "attention_mask": np.ones_like(ids), **caches}, tmp_path)


def test_the_form_of_the_builder_is_cut(tmp_path: Path) -> None:
    """Values lose as many channels as keys, whose width is held by nothing but norms."""
    path = BuilderDecoder(head_norms="nodes").write(tmp_path / "m.onnx")
    check_cut_with_caches(path, {"input_ids": np.random.default_rng(0).integers(0, 64, (8, 9))}, tmp_path)


# -- what users read -------------------------------------------------------------------------------------------------


def test_the_approximation_is_named_everywhere(tmp_path: Path) -> None:
    path, data, out = tmp_path / "m.onnx", tmp_path / "data.npz", tmp_path / "out.onnx"
    onnx.save(HeadNorms().model(), path)
    np.savez(data, x=HeadNorms().feeds(32)["x"])
    options = ("--ratio", 0.5, "--roles", "qk", "--calib", data)
    assert "queries and keys are normalized" in invoke("inspect", path).stdout
    said = "approximate: norm on query and key heads refitted: qk.0"
    assert said in invoke("plan", path, *options, "-o", tmp_path / "plan.json").stdout
    assert said in invoke("prune", path, *options, "-o", out).stdout
    report = reported("prune", path, *options, "-o", tmp_path / "again.onnx", "--report", tmp_path / "report.html")
    (group,) = [g for g in report["groups"] if g["role"] == "qk"]
    assert (group["form"], group["approximation"]) == ("coupled_refit", "norm on query and key heads refitted")
    assert "approximate: norm on query and key heads refitted" in (tmp_path / "report.html").read_text()


def test_without_data_nothing_is_fitted_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(HeadNorms().model(), path)
    said = invoke("prune", path, "--ratio", 0.5, "--roles", "qk", "-o", tmp_path / "out.onnx").stdout
    assert "approximate: norm on query and key heads not refitted: qk.0" in said
    assert "refitting takes --calib DATA" in said
