"""Hidden layers that are normalized inside: fitted to the statistics of what stays, tried as they will be cut, and
offered to the planner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.weights.normalizations import HiddenNormalization
from snpc.runtime.closed_form.algebra import NormalizedMoments, affine_for_fewer_units, statistic_variances
from snpc.runtime.closed_form.masked_weights import changed_constants
from snpc.runtime.execution import SpillableStore
from snpc.runtime.sensitivity.loss_curves import trial_constants, trial_edits
from snpc.runtime.sensitivity.segmented_model import open_segmented_model
from snpc.types import Group
from tests.closed_forms import calibration_of, closed_forms_on, pruned_bytes, random_feeds, relative_change
from tests.command_line import invoke, reported
from tests.models.exports import export
from tests.models.hidden_norms import HIDDEN_NORMS
from tests.oracle import TOLERANCE, analysis_at, analysis_of, prunable, relative_error, run

NAMES = [*HIDDEN_NORMS, "eva02__ts17"]


def inside(analysis: Analysis) -> list[Group]:
    return [g for g in prunable(analysis.groups) if g.approximate and g.role != "residual"]


def halved(analysis: Analysis, group: Group, feeds: dict[str, np.ndarray], name: str) -> snpc.PruningPlan:
    found = closed_forms_on(name, feeds, [group])
    best = tuple(sorted(found.elimination_orders[group.id][0].order[group.size // 2 :].tolist()))
    return snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, {group.id: (best,)}, "parallel"), found)


# -- the algebra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("centered", [True, False])
def test_scale_and_shift_are_those_of_least_squares(seed: int, centered: bool) -> None:
    """Where the deviation over fewer units is the same in every row, as the moments have it."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(400, 9)) @ rng.normal(size=(9, 9)) + rng.normal(size=9)
    keep = np.sort(rng.permutation(9)[:5])
    mean, covariance = rows.mean(0), np.cov(rows.T, bias=True)
    scale, shift = affine_for_fewer_units(NormalizedMoments(mean, covariance), keep, centered)
    moved = rows[:, keep] - (rows[:, keep].mean(1, keepdims=True) if centered else 0.0)
    z = moved / np.sqrt(np.mean(moved**2))
    for unit, channel in enumerate(keep):
        expected = np.polyfit(z[:, unit], rows[:, channel], 1)
        np.testing.assert_allclose((scale[unit], shift[unit]), expected, atol=1e-8)


@pytest.mark.parametrize("positions", [1, 5])
def test_statistics_vary_as_the_squares_that_go(positions: int) -> None:
    """Of independent normal units; the deviation is the root of what stays of their squares."""
    rng = np.random.default_rng(0)
    mean, spread = np.array([0.0, 1.5, -0.5, 0.2]), np.array([1.0, 0.4, 0.8, 0.1])
    rows = mean + spread * rng.normal(size=(40_000, positions, 4))
    found = statistic_variances(NormalizedMoments(mean, np.diag(spread**2)), positions)
    lost = np.mean(rows**2, axis=1) / 4  # a share of the squares, which add up to the number of units
    np.testing.assert_allclose(found, np.var(lost / 2, axis=0), rtol=0.05)


def test_what_a_gain_hides_is_no_error() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 4))
    gain, bias = np.array([1.5, 0.0, -2.0, 0.7]), rng.normal(size=4)
    seen = rows * gain + bias
    found = NormalizedMoments.before_affine(seen.mean(0), np.cov(seen.T, bias=True), gain, bias)
    expected = np.cov(rows.T, bias=True)
    shown = [0, 2, 3]
    np.testing.assert_allclose(found.mean[shown], rows.mean(0)[shown])
    np.testing.assert_allclose(found.covariance[np.ix_(shown, shown)], expected[np.ix_(shown, shown)])
    assert found.covariance[1].tolist() == [0, 1, 0, 0]


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gain_and_bias_are_found_however_they_are_spelled(name: str) -> None:
    analysis = analysis_of(name)
    for group in inside(analysis):
        weights = analysis.weights[group.id]
        assert weights.kind == "refit"
        assert weights.normalizations
        for norm in weights.normalizations:
            assert isinstance(norm, HiddenNormalization)
            assert norm.centered == (norm.bias is not None)  # a root mean square has neither here
            assert all(sorted(p.units.reshape(-1).tolist()) == list(range(group.size)) for p in norm.probes)


# -- trials are what will be cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_is_the_model_that_is_written(name: str) -> None:
    """The statistics of a trial are those of the units that stay."""
    analysis, feeds = analysis_of(name), random_feeds(name, 8)
    for group in inside(analysis)[:2]:
        plan = halved(analysis, group, feeds, name)
        assert plan.closed_forms is not None
        found, width = plan.closed_forms, group.size // 2
        scores = snpc.UnitScores(
            analysis, "", {group.id: np.argsort(found.elimination_orders[group.id][0].order)[None]}
        )
        changed = {group.id: changed_constants(analysis.traced_graph, *trial_edits(found, scores, group, width))}
        with open_segmented_model(analysis, changed) as model:
            dense = model.dense_states(feeds, SpillableStore(1 << 30))
            tried = model.outputs_with(dense, group.id, trial_constants(found, scores, group, width))
        written = run(pruned_bytes(plan), feeds)
        assert relative_error(run(export(name), feeds), written) > 1e-3
        # biases that need a node of their own are left out of trials
        assert relative_error(written, [tried[spec.name] for spec in analysis.model.outputs]) < 2e-2


@pytest.mark.parametrize("name", ["matcher__ts17", "conv_norms__ts17", "conv_norms__dyn21", "eva02__ts17"])
def test_fitting_moves_the_outputs_less(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data, others = calibration_of(analysis, random_feeds(name, 48), 16), random_feeds(name, 16, 7)
    moves = {}
    only = "|".join(f"^{g.id}$" for g in inside(analysis))
    for method in ("auto", "select"):
        budget = snpc.Budget(0.5, ("ffn", "conv"), uniform=True, include=only)
        made = snpc.plan(analysis, budget, calibration=data, method=method, criterion="activation")
        result = snpc.apply(made, tmp_path / "p.onnx")
        moves[method] = relative_change(run(export(name), others), run(result.path, others))
        equal = result.verification.max_abs_diff
        assert equal is not None
        assert equal < TOLERANCE
    assert moves["auto"] < 0.95 * moves["select"]


def test_gain_and_bias_make_up_for_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "matcher__ts17"
    analysis, feeds = analysis_of(name), random_feeds(name, 32)
    group = inside(analysis)[0]
    found = closed_forms_on(name, feeds, [group])
    spread = np.diag(found.moments[group.id].normalized[0].moment)
    keep = tuple(np.sort(np.argsort(spread)[: group.size // 2]).tolist())  # over these the deviation is smaller
    plan = snpc.PruningPlan(snpc.SlicePlan(analysis, "", {}, {group.id: (keep,)}, "parallel"), found)
    moved = []
    for fitted in (True, False):
        if not fitted:
            monkeypatch.setattr("snpc.runtime.closed_form.fit.fit_normalizations_inside", lambda *arguments: None)
        moved.append(relative_change(run(export(name), feeds), run(pruned_bytes(plan), feeds)))
    assert moved[0] < 0.95 * moved[1]


# -- the planner -----------------------------------------------------------------------------------------------------


def test_a_target_cuts_them_like_other_layers(tmp_path: Path) -> None:
    name = "matcher__ts17"
    analysis = analysis_of(name)
    data = calibration_of(analysis, random_feeds(name, 32), 8)
    made = snpc.plan(analysis, snpc.Budget(target="macs=0.5"), calibration=data)
    cut = [g for g in inside(analysis) if g.id in made.slices.keep]
    assert cut
    assert all(np.isfinite(made.loss_curves[g.id]).all() for g in inside(analysis))
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert result.closed_forms[cut[0].id] == "refit"
    assert "normalized inside" in cut[0].freedom_reason


@pytest.mark.parametrize("name", ["sublayer_norm__ts17", "conv_norms__ts14"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    model = onnx.load(export(name))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "value"):
        if attribute.t.data_type == onnx.TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float16)))
    del model.graph.value_info[:]
    analysis = analysis_at(tmp_path / "half.onnx", model)
    data = calibration_of(analysis, random_feeds(name, 16), 8)
    made = snpc.plan(analysis, snpc.Budget(target="macs=0.8", roles=("ffn", "conv")), calibration=data)
    assert any(g.id in made.slices.keep for g in inside(analysis))
    equal = snpc.apply(made, tmp_path / "p.onnx").verification.max_abs_diff
    assert equal is not None
    assert equal < 1e-3


def test_without_data_they_are_cut_too_and_named_everywhere(tmp_path: Path) -> None:
    path, out = export("sublayer_norm__ts17"), tmp_path / "out.onnx"
    assert "normalized inside" in invoke("inspect", path).stdout
    report = reported("prune", path, "--ratio", 0.5, "-o", out, "--report", tmp_path / "report.html")
    named = [g for g in report["groups"] if g["normalized_inside"]]
    assert [(g["role"], g["kept"] < g["size"]) for g in named] == [("ffn", True)] * 3
    assert "refit" not in {g["form"] for g in named}
    assert "normalized inside" in (tmp_path / "report.html").read_text()
    said = invoke("prune", path, "--ratio", 0.5, "-o", tmp_path / "again.onnx").stdout
    assert "approximate: normalized inside, not refitted: " in said
    assert "and 2 more, whose statistics are now over fewer units" in said
