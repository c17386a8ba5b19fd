"""Fitting layer after layer: segments together are the graph, nothing to cut changes nothing, gaps only close."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snpc
from snpc.graph.subgraph import extract_segment, split_into_segments
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.pipeline.refit import with_refitted_weights
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan, cuts_of
from snpc.runtime.closed_form.layerwise import fit_layerwise
from snpc.runtime.closed_form.stages import FitStage, NotSegmentable, add_missing_biases, groups_to_fit, schedule_stages
from snpc.runtime.execution.session import SessionLoadError, open_session
from snpc.runtime.io.save import save
from tests.closed_forms import calibration_of, prunable_of
from tests.oracle import Array, analysis_of, feeds_of, relative_error, run, written

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
def test_every_layer_is_fitted_in_a_segment_of_its_own(name: str) -> None:
    decision, _ = made(name, "auto", 0.5)
    analysis = analysis_of(name)
    assert decision.closed_forms is not None
    stages = schedule_stages(analysis, add_missing_biases(decision.closed_forms, decision.slices), decision.slices)
    groups, _ = groups_to_fit(analysis, decision.slices)
    staged = [g.id for stage in stages for g in stage.groups]
    assert sorted(staged) == sorted(g.id for g in groups)
    ffn = [k for k, stage in enumerate(stages) for g in stage.groups if g.role == "ffn"]
    assert len(set(ffn)) == len(ffn) == len(prunable_of(analysis, "ffn"))
    assert sum(len(stage.residual_errors) for stage in stages) == len(ffn)


@pytest.mark.parametrize("name", ["vit_timm__ts17", "gpt2__ts17"])
def test_the_stream_comes_closer_to_the_dense_one(name: str) -> None:
    """After the last feed-forward layer the gap on the calibration data is smaller than without making up for it: ridge
    regression never does worse than nothing on the rows that it is solved on."""
    decision, _ = made(name, "auto", 0.5)
    assert decision.closed_forms is not None
    analysis = analysis_of(name)
    stage = schedule_stages(analysis, add_missing_biases(decision.closed_forms, decision.slices), decision.slices)[-1]
    (gap,) = stage.residual_errors
    dense = stream(analysis.traced_graph.model, gap.value, name)
    found = {}
    for method in ("auto", "parallel"):
        slices = replace(decision.slices, method=method)  # type: ignore[arg-type]
        plan, source = with_refitted_weights(replace(decision, slices=slices))
        cut = rewrite_model(source, cuts_of(plan)).model
        found[method] = float(np.sum((stream(cut, gap.value, name) - dense) ** 2))
    assert found["auto"] < found["parallel"]


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
    assert decision.closed_forms is not None
    analysis = analysis_of(name)
    base = add_missing_biases(decision.closed_forms, decision.slices)
    border = schedule_stages(analysis, base, decision.slices)[0].segment.outputs[0]
    types = {v: None if v.name == border else dtype for v, dtype in base.facts.dtype.items()}
    blind = replace(base, facts=replace(base.facts, dtype=types))
    with pytest.raises(NotSegmentable, match=re.escape(border)):
        schedule_stages(analysis, blind, decision.slices)
    monkeypatch.setattr("snpc.runtime.closed_form.layerwise.add_missing_biases", lambda *_: blind)
    assert_fitted_all_at_once(name, decision, calibration)


def test_where_a_piece_does_not_load_all_is_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_timm__ts17"
    decision, calibration = made(name, "auto", 0.5)

    def refuses(*args: object, **options: object) -> None:
        raise SessionLoadError("sizes that are not known")

    monkeypatch.setattr("snpc.runtime.closed_form.layerwise.temporary_session", refuses)
    with pytest.raises(NotSegmentable, match="sizes that are not known"):
        fit_layerwise(decision.closed_forms, decision.slices, calibration)  # type: ignore[arg-type]
    assert_fitted_all_at_once(name, decision, calibration)


def test_a_stage_without_groups_only_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all that is fitted there lies elsewhere too (what makes tables of positions, say)."""
    name = "vit_timm__ts17"
    decision, calibration = made(name, "auto", 0.5)
    kept = {k: v for k, v in decision.slices.keep.items() if ".1." in k or "s1" in k}
    assert 0 < len(kept) < len(decision.slices.keep)
    plan = replace(decision.slices, keep=kept)

    def emptied(*args: Any) -> list[FitStage]:
        first, *rest = schedule_stages(*args)
        return [replace(first, groups=(), kinds={}, requests=(), residual_errors=()), *rest]

    whole = fit_layerwise(decision.closed_forms, plan, calibration)  # type: ignore[arg-type]
    monkeypatch.setattr("snpc.runtime.closed_form.layerwise.schedule_stages", emptied)
    without = fit_layerwise(decision.closed_forms, plan, calibration)  # type: ignore[arg-type]
    feeds = feeds_of(name)
    for a, b in zip(
        run(written(finalize(whole.model)), feeds), run(written(finalize(without.model)), feeds), strict=True
    ):
        assert np.isfinite(b).all() and relative_error(a, b) < 0.5


def assert_fitted_all_at_once(name: str, decision: snpc.PruningPlan, calibration: object) -> None:
    plan, source = with_refitted_weights(decision)
    parallel = with_refitted_weights(replace(decision, slices=replace(decision.slices, method="parallel")))[1]
    for a, b in zip(
        run(written(rewrite_model(source, cuts_of(plan)).model), feeds_of(name)),
        run(written(rewrite_model(parallel, cuts_of(plan)).model), feeds_of(name)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
