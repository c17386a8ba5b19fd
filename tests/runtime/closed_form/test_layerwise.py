"""Fitting layer after layer: segments together are the graph, nothing to cut changes nothing, gaps only close."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.graph.subgraph import extract_segment, split_into_segments
from snpc.passes import remove_sublayers
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.pipeline.refit import with_refitted_weights
from snpc.planning.config import Budget
from snpc.planning.plan import PruningMethod, SlicePlan, cuts_of
from snpc.runtime.batches import BatchProgram, BatchSums, LocalBatchValues
from snpc.runtime.batches.packed_symmetric import row_strips
from snpc.runtime.closed_form.fit import fit_parallel
from snpc.runtime.closed_form.layerwise import (
    CROSS,
    GRAM,
    MAX_RESIDUAL_DAMPING,
    RESIDUAL_DAMPING,
    RESIDUAL_RIDGES,
    TOTAL,
    fit_layerwise,
    solve_residual_error,
)
from snpc.runtime.closed_form.ridge import Regression, choose_ridge
from snpc.runtime.closed_form.stages import NotSegmentable, residual_errors, schedule_stages
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.session import SessionLoadError, open_session
from snpc.runtime.io.save import save
from snpc.types import FloatArray
from tests.closed_forms import calibration_of, prunable_of, random_feeds
from tests.oracle import Array, analysis_of, feeds_of, relative_error, run, written
from tests.recorded_progress import RecordedProgress

NAMES = (
    "vit_timm__ts17",
    "bert__dyn20_sdpa",
    "gpt2__ts17",
    "swin_timm__ts17",
    "bart__ts17",
    "llama__ts17",
    "albert__ts17",
)


@pytest.mark.parametrize("name", NAMES)
def test_segments_one_after_the_other_are_the_graph(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    feeds = feeds_of(name)
    model, facts = analysis.traced_graph.model, analysis.traced_graph.facts
    count = len(list(model.graph))
    held: dict[str, Array] = dict(feeds)
    for segment in split_into_segments(model, [count // 4, count // 3, count // 2, count - 3]):
        save(finalize(extract_segment(model, segment, facts)), tmp_path / "part.onnx")
        session = open_session(tmp_path / "part.onnx", optimization="off")
        names = [o.name for o in session.get_outputs()]
        assert set(names) == set(segment.outputs)
        if names:
            inputs = {i.name: held[i.name] for i in session.get_inputs()}
            held |= dict(zip(names, session.run(names, inputs), strict=True))
        held = {k: v for k, v in held.items() if k in segment.live_values}
    whole = run(analysis.model.path, feeds)
    for spec, array in zip(analysis.model.outputs, whole, strict=True):
        assert relative_error(array, held[spec.name]) < 1e-5


def made(
    name: str, method: str, ratio: float, roles: tuple[str, ...] = ("qk", "vo", "ffn")
) -> tuple[snpc.PruningPlan, object]:
    analysis = analysis_of(name)
    calibration = calibration_of(analysis, feeds_of(name))
    choice = Budget(ratio, roles, uniform=True)  # type: ignore[arg-type]
    return snpc.plan(analysis, choice, calibration=calibration, method=method), calibration  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_cuts_nothing_changes_nothing(name: str) -> None:
    decision, calibration = made(name, "auto", 0.5)
    assert decision.closed_forms is not None
    whole = replace(decision.slices, keep={})
    source = fit_layerwise(decision.closed_forms, whole, calibration)  # type: ignore[arg-type]
    feeds = feeds_of(name)
    moved = run(written(finalize(source.model)), feeds)
    for before, after in zip(run(analysis_of(name).model.path, feeds), moved, strict=True):
        assert relative_error(before, after) < 1e-5


@pytest.mark.parametrize("name", ["vit_timm__ts17", "bert__dyn20_sdpa", "gpt2__ts17", "bart__ts17"])
def test_every_feed_forward_layer_ends_a_segment_of_its_own(name: str) -> None:
    decision, _ = made(name, "auto", 0.5)
    analysis = analysis_of(name)
    errors = residual_errors(analysis, decision.groups)
    assert [error.group.id for error in errors] == [g.id for g in prunable_of(analysis, "ffn")]
    cut = rewrite_model(analysis.traced_graph, cuts_of(decision.slices))
    stages = schedule_stages(cut.model, cut.source.facts, errors, [error.value for error in errors])
    assert [stage.error for stage in stages] == errors
    assert [stage.segment.last for stage in stages[:-1]] == [stage.segment.first for stage in stages[1:]]


@pytest.mark.parametrize("name", ["vit_timm__ts17", "gpt2__ts17", "bert__dyn20_sdpa"])
def test_the_product_at_a_border_is_what_the_fitted_layer_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next segment starts from the values that the fitted cut model has there, though that was never run."""
    decision, calibration = made(name, "auto", 0.5)
    analysis, borders = analysis_of(name), {}
    run_program = LocalBatchValues.run

    def watched(values: LocalBatchValues, program: BatchProgram) -> BatchSums:
        sums = run_program(values, program)
        if set(program.kept) == {"corrected"}:
            (border,) = program.kept.values()
            borders[border] = np.concatenate([batch[border] for batch in values.batches])
        return sums

    monkeypatch.setattr(LocalBatchValues, "run", watched)
    assert decision.closed_forms is not None
    source = fit_layerwise(decision.closed_forms, decision.slices, calibration)  # type: ignore[arg-type]
    cut = rewrite_model(source, cuts_of(decision.slices)).model
    assert len(borders) == len(prunable_of(analysis, "ffn")) - 1 > 0
    for border, values in borders.items():
        assert relative_error(stream(cut, border, name), values) < 1e-5


@pytest.mark.parametrize("name", ["vit_timm__ts17", "gpt2__ts17"])
def test_the_stream_comes_closer_to_the_dense_one(name: str) -> None:
    """After the last feed-forward layer the gap on the calibration data is smaller than without making up for it: ridge
    regression never does worse than nothing on the rows that it is solved on."""
    decision, _ = made(name, "auto", 0.5)
    assert decision.closed_forms is not None
    analysis = analysis_of(name)
    gap = residual_errors(analysis, decision.groups)[-1]
    dense = stream(analysis.traced_graph.model, gap.value, name)
    found = {}
    for method in ("auto", "parallel"):
        slices = replace(decision.slices, method=method)  # type: ignore[arg-type]
        plan, source = with_refitted_weights(replace(decision, slices=slices))
        cut = rewrite_model(source, cuts_of(plan)).model
        found[method] = float(np.sum((stream(cut, gap.value, name) - dense) ** 2))
    assert found["auto"] < found["parallel"]


def test_without_a_layer_attention_outputs_are_fitted_too() -> None:
    """Of grouped heads, each of whose values several output columns read; rotated ones and cut ones as well."""
    name = "llama__ts17"
    analysis, calibration = analysis_of(name), calibration_of(analysis_of(name), feeds_of(name))
    layer = next(s.name for s in analysis.sublayers if s.kind == "feed-forward")
    shorter = remove_sublayers(analysis, [layer])
    decision = snpc.plan(shorter, Budget(ratio=0.25, roles=("vo",)), calibration=calibration)
    errors = residual_errors(shorter, decision.groups)
    assert {e.group.role for e in errors} == {"vo", "ffn"}
    assert any(shorter.weights[e.group.id].consumers[0].columns > 1 for e in errors)
    plan, source = with_refitted_weights(decision)
    assert decision.closed_forms is not None
    plain = fit_parallel(decision.closed_forms, plan)
    (dense,) = run(analysis.model.path, feeds_of(name))
    gaps = []
    for fitted in (source, plain):
        (found,) = run(written(finalize(rewrite_model(fitted, cuts_of(plan)).model)), feeds_of(name))
        gaps.append(relative_error(dense, found))
    assert gaps[0] < gaps[1]


def stream(model: object, value: str, name: str) -> Array:
    copy = model.clone()  # type: ignore[attr-defined]
    made = next(v for node in copy.graph for v in node.outputs if v.name == value)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(made)
    made.dtype = analysis_of(name).traced_graph.facts.dtype[
        next(v for v in analysis_of(name).traced_graph.facts.dtype if v.name == value)
    ]
    (array,) = run(written(finalize(copy)), feeds_of(name))
    return array.astype(np.float64)


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "bart__ts17"])
@pytest.mark.slow
def test_prune_and_verify_agree(name: str, tmp_path: Path) -> None:
    decision, calibration = made(name, "auto", 0.5)
    target = tmp_path / "cut.onnx"
    result = snpc.apply(decision, target)
    assert result.verification.max_abs_diff is not None and result.verification.max_abs_diff < 1e-4
    plan: SlicePlan = snpc.plan_from_json(snpc.plan_to_json(decision.slices), analysis_of(name), "plan")
    again = snpc.verify(analysis_of(name).model.path, target, plan=snpc.complete_plan(plan, calibration))
    assert again.max_abs_diff is not None and again.max_abs_diff < 1e-4


def test_what_cannot_be_handed_over_is_fitted_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_timm__ts17"
    decision, calibration = made(name, "auto", 0.5)
    analysis = analysis_of(name)
    errors = residual_errors(analysis, decision.groups)
    graph = analysis.traced_graph
    border = errors[0].value
    types = {v: None if v.name == border else dtype for v, dtype in graph.facts.dtype.items()}
    blind = replace(graph.facts, dtype=types)
    with pytest.raises(NotSegmentable, match=re.escape(border)):
        schedule_stages(graph.model, blind, errors, [error.value for error in errors])

    def refuses(*_: object) -> None:
        schedule_stages(graph.model, blind, errors, [error.value for error in errors])

    monkeypatch.setattr("snpc.runtime.closed_form.layerwise.schedule_stages", refuses)
    assert_fitted_all_at_once(name, decision, calibration)


def test_where_a_piece_does_not_load_all_is_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_timm__ts17"
    decision, calibration = made(name, "auto", 0.5)

    def refuses(*args: object, **options: object) -> None:
        raise SessionLoadError("sizes that are not known")

    monkeypatch.setattr("snpc.runtime.batches.batch_values.temporary_session", refuses)
    with pytest.raises(NotSegmentable, match="sizes that are not known"):
        fit_layerwise(decision.closed_forms, decision.slices, calibration)  # type: ignore[arg-type]
    assert_fitted_all_at_once(name, decision, calibration)


def test_dense_values_that_were_measured_serve_the_fit() -> None:
    """Those that were kept in the pass for the statistics give the same weights as a pass of their own."""
    decision, calibration = made("vit_timm__ts17", "auto", 0.5)
    assert decision.closed_forms is not None and decision.dense_values is not None
    found = [
        fit_layerwise(decision.closed_forms, decision.slices, calibration, dense=dense)  # type: ignore[arg-type]
        for dense in (None, decision.dense_values)
    ]
    one, other = (run(written(finalize(source.model)), feeds_of("vit_timm__ts17")) for source in found)
    for a, b in zip(one, other, strict=True):
        assert relative_error(a, b) < 1e-5


def assert_fitted_all_at_once(name: str, decision: snpc.PruningPlan, calibration: object) -> None:
    plan, source = with_refitted_weights(decision)
    parallel = with_refitted_weights(replace(decision, slices=replace(decision.slices, method="parallel")))[1]
    for a, b in zip(
        run(written(rewrite_model(source, cuts_of(plan)).model), feeds_of(name)),
        run(written(rewrite_model(parallel, cuts_of(plan)).model), feeds_of(name)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# -- the regression of the residual error ----------------------------------------------------------------------------


def batch_sums(batches: list[tuple[FloatArray, FloatArray]]) -> BatchSums:
    """What the measuring program sums over batches of (hidden units, errors)."""
    sums = BatchSums()
    for number, (units, error) in enumerate(batches):
        half = sums.odd if number % 2 else sums.even
        extended = np.hstack([units, np.ones((len(units), 1))])
        for name, array in (
            (GRAM, pack(extended.T @ extended)),
            (CROSS, (units.T @ error)[None]),
            (TOTAL, error.sum(axis=0)[None]),
        ):
            half[name] = half.get(name, np.zeros(array.shape)) + array
    return sums


def pack(matrix: FloatArray) -> FloatArray:
    return np.concatenate([matrix[start:stop, start:].reshape(-1) for start, stop in row_strips(len(matrix))])


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_error_is_regressed_on_hidden_units_about_the_means(noise: float) -> None:
    """With the chosen ridge, as centered rows give it; the ridge grows with the noise."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 4))
    batches = []
    for _ in range(5):
        units = rng.standard_normal((12, 6)) + 3
        batches.append((units, units @ mixing + 2 + noise * rng.standard_normal((12, 4))))
    correction, bias = solve_residual_error(batch_sums(batches), 6)
    units, error = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    x, y = units - units.mean(axis=0), error - error.mean(axis=0)
    odd = np.concatenate([np.full(12, number % 2) for number in range(5)]) == 1
    halves = [Regression(x[rows].T @ x[rows], x[rows].T @ y[rows]) for rows in (~odd, odd)]
    chosen = choose_ridge(halves, RESIDUAL_RIDGES, RESIDUAL_DAMPING).ridge
    assert chosen < 1e-3 if noise == 0 else 1e-2 < chosen < 1
    np.testing.assert_allclose(correction, (halves[0] + halves[1]).solve(chosen), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(bias, error.mean(axis=0) - units.mean(axis=0) @ correction, rtol=1e-9)


def test_an_error_that_hidden_units_do_not_tell_takes_the_largest_ridge() -> None:
    rng = np.random.default_rng(1)
    batches = [(rng.standard_normal((40, 30)), 5 + rng.standard_normal((40, 8))) for _ in range(4)]
    correction, bias = solve_residual_error(batch_sums(batches), 30)
    units, error = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    x, y = units - units.mean(axis=0), error - error.mean(axis=0)
    largest = Regression(x.T @ x, x.T @ y).solve(MAX_RESIDUAL_DAMPING)
    np.testing.assert_allclose(correction, largest, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(bias, 5, atol=0.3)


def test_one_batch_takes_a_fixed_ridge() -> None:
    rng = np.random.default_rng(2)
    units, error = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
    correction, _ = solve_residual_error(batch_sums([(units, error)]), 4)
    x, y = units - units.mean(axis=0), error - error.mean(axis=0)
    expected = Regression(x.T @ x, x.T @ y).solve(RESIDUAL_DAMPING)
    np.testing.assert_allclose(correction, expected, rtol=1e-3, atol=1e-6)


def test_layers_are_fitted_through_narrower_caches() -> None:
    """On pasts that hold something, in this process and on workers alike; and it is better than no such fit."""
    model = analysis_of("llama_cached__dyn20").model
    analysis = snpc.analyze(model, prune_kv_cache=True)
    calibration = snpc.load_calibration(random_feeds("llama_cached__dyn20", 24), model.inputs, samples=16, batch=4)
    budget, found = snpc.Budget(0.4, uniform=True), {}
    with ThreadPoolExecutor(2) as pool:
        for name, executor in (("parallel", None), ("auto", None), ("auto on workers", pool)):
            progress = RecordedProgress()
            execution = Execution(threads=1, executor=executor, progress=progress)
            method: PruningMethod = "parallel" if name == "parallel" else "auto"
            plan = snpc.plan(analysis, budget, calibration, method=method, execution=execution)
            pruned = snpc.apply(plan)
            assert ("layers" in progress.begun) == (name != "parallel")
            assert any("past" in spec.name and spec.shape[3] != 12 for spec in snpc.load(pruned.path).inputs)
            found[name] = pruned.quality.drift
    assert found["auto"] < found["parallel"]
    assert found["auto on workers"] == pytest.approx(found["auto"], rel=1e-6)
