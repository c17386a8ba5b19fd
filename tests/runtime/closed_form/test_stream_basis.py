"""The basis of a residual stream: what it loses, and the whole way of a rotated stream through a prune."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import snpc
from snpc.errors import UserError
from snpc.runtime.closed_form.stream_basis import (
    RIDGE,
    ReadMoments,
    channel_order,
    principal_directions,
    with_stream_bases,
)
from snpc.types import FloatArray
from tests.closed_forms import calibration_of
from tests.models.exports import export
from tests.models.streams import (
    ENTERED_FORMS,
    HALF_FORMS,
    TOKENS,
    WIDTH,
    write_half_stream,
    write_stream,
)
from tests.oracle import analysis_at, analysis_of, feeds_of, relative_error, run

KEPT = 4


def random_reads(count: int = 3, size: int = 6) -> list[ReadMoments]:
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(size=(40, 3)) @ rng.normal(size=(3, size)) + 0.1 * rng.normal(size=(40, size)) for _ in range(count)
    ]
    weights = [rng.normal(size=(size, 4)) for _ in range(count)]
    return [ReadMoments(x.T @ x / len(x), w @ w.T) for x, w in zip(rows, weights, strict=True)]


def lost_share(read: ReadMoments, directions: FloatArray) -> float:
    """By the definition: what a least-squares fit on the rows' ``directions`` [D, k] leaves."""
    moments = read.moments + np.eye(len(read.moments)) * RIDGE * np.trace(read.moments)
    seen = directions.T @ moments
    left = moments - seen.T @ np.linalg.solve(seen @ directions, seen)
    return float(np.sum(left * read.weights) / np.sum(moments * read.weights))


def test_losses_are_those_of_a_fit() -> None:
    reads = random_reads()
    for basis in (np.eye(6), principal_directions(reads)):
        for read in reads:
            losses = read.turned(basis).losses()
            expected = [1.0, *(lost_share(read, basis[:, :k]) for k in range(1, 7))]
            np.testing.assert_allclose(losses, expected, atol=1e-9)


def test_channels_go_first_that_the_others_know() -> None:
    """A channel that is the sum of two others, and one that nothing reads, go before any other."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, 6))
    rows[:, 2] = rows[:, 0] + rows[:, 1]
    weight = rng.normal(size=(6, 4))
    weight[5] = 0.0
    order = channel_order([ReadMoments(rows.T @ rows / 50, weight @ weight.T)])
    assert sorted(order) == list(range(6))
    assert 5 in order[-2:]
    assert set(order[-2:]) & {0, 1, 2}


@pytest.mark.parametrize("form", ["layer norm", "root mean square", "tied to the embeddings"])
def test_directions_lose_less_than_channels(form: str, tmp_path: Path) -> None:
    """Planned, written, verified, and written again from the plan's file: the same model."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream(form))
    calibration = calibration_of(analysis, TOKENS)
    made = snpc.plan(analysis, snpc.Budget(1 - KEPT / WIDTH, roles=("residual",)), calibration)
    (stream,) = made.analysis.stream_bases
    assert stream.rotated
    assert stream.rotation[KEPT] < 0.7 * stream.channels[KEPT]
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert result.verification.max_abs_diff is not None
    outputs = run(analysis.model.path, TOKENS)
    error = relative_error(outputs, run(result.path, TOKENS))

    channels = snpc.plan(
        analysis, snpc.Budget(1 - KEPT / WIDTH, roles=("residual",)), calibration, method="auto", criterion="mixed"
    )
    assert not channels.analysis.stream_bases
    by_channels = snpc.apply(channels, tmp_path / "c.onnx")
    assert error < 0.5 * relative_error(outputs, run(by_channels.path, TOKENS))

    report = snpc.json_report(result)
    (entry,) = report["residual_streams"]
    assert (entry["basis"], entry["kept"]) == ("rotated", KEPT)
    assert entry["loss_of_rotation"] < entry["loss_of_channels"]
    assert all("keep" not in site for group in report["groups"] for site in group["sites"])

    snpc.save_plan(made, tmp_path / "plan.json")
    slices = snpc.load_plan(tmp_path / "plan.json", analysis.model)
    assert slices.rotated == (stream.group,)
    with pytest.raises(UserError, match="rotates the residual stream"):
        snpc.complete_plan(slices)
    completed = snpc.complete_plan(slices, calibration)
    again = snpc.apply(completed, tmp_path / "again.onnx")
    for a, b in zip(onnx.load(result.path).graph.initializer, onnx.load(again.path).graph.initializer, strict=True):
        np.testing.assert_allclose(numpy_helper.to_array(a), numpy_helper.to_array(b), rtol=1e-4, atol=1e-5)
    snpc.verify(analysis.model.path, result.path, plan=completed)


@pytest.mark.parametrize("form", HALF_FORMS)
def test_half_precision(form: str, tmp_path: Path) -> None:
    """Rotated, verified, and nearer to the original than by channels: in half precision, and where it is mixed."""
    analysis = analysis_at(tmp_path / "m.onnx", write_half_stream(form))
    calibration = calibration_of(analysis, TOKENS)
    errors = []
    for options in ({}, {"criterion": "mixed", "method": "auto"}):
        budget = snpc.Budget(1 - KEPT / WIDTH, roles=("residual",))
        made = snpc.plan(analysis, budget, calibration, **options)  # type: ignore[arg-type]
        assert all(stream.rotated for stream in made.analysis.stream_bases), made.analysis.stream_bases[0].reason
        result = snpc.apply(made, tmp_path / "p.onnx")
        assert result.verification.max_abs_diff is not None
        errors.append(relative_error(run(analysis.model.path, TOKENS), run(result.path, TOKENS)))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("form", ENTERED_FORMS)
def test_a_stream_begins_behind_a_weight(form: str, tmp_path: Path) -> None:
    """Where a norm or an activation makes its first values: rotated and verified, and again from the plan's file."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream(form))
    calibration = calibration_of(analysis, TOKENS)
    made = snpc.plan(analysis, snpc.Budget(1 - KEPT / WIDTH, roles=("residual",)), calibration)
    result = snpc.apply(made, tmp_path / "p.onnx")
    (entry,) = snpc.json_report(result)["residual_streams"]
    assert (entry["basis"], entry["kept"], entry["begins_behind"]) == ("rotated", KEPT, "x")
    assert result.verification.max_abs_diff is not None
    channels = snpc.plan(
        analysis, snpc.Budget(1 - KEPT / WIDTH, roles=("residual",)), calibration, method="auto", criterion="mixed"
    )
    outputs = run(analysis.model.path, TOKENS)
    errors = [relative_error(outputs, run(snpc.apply(p, tmp_path / "c.onnx").path, TOKENS)) for p in (made, channels)]
    assert errors[0] < 0.7 * errors[1]

    snpc.save_plan(made, tmp_path / "plan.json")
    again = snpc.complete_plan(snpc.load_plan(tmp_path / "plan.json", analysis.model), calibration)
    snpc.verify(analysis.model.path, result.path, plan=again)
    wrong = {**json.loads((tmp_path / "plan.json").read_text()), "entries": ["nothing"]}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match='"entries"'):
        snpc.load_plan(tmp_path / "wrong.json", analysis.model)


@pytest.mark.parametrize("tokens", ["topk:0.7@1", "merge:2@1"])
def test_with_fewer_tokens(tokens: str, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    result = snpc.prune(
        export("vit_timm__ts17"), tmp_path / "p.onnx", calibration={"x": pictures}, tokens=tokens, ratio=0.25,
        roles=("residual",),
    )  # fmt: skip
    (entry,) = snpc.json_report(result)["residual_streams"]
    assert entry["basis"] == "rotated"
    assert entry["kept"] < entry["size"]
    assert result.verification.max_abs_diff is not None


def test_other_groups_are_as_before() -> None:
    """Rotary tables that layers share join nothing, though the analyzed graph was run."""
    analysis = analysis_of("llama__ts17")
    calibration = calibration_of(analysis, feeds_of("llama__ts17"))
    rotated = with_stream_bases(analysis, calibration)
    assert any(stream.rotated for stream in rotated.stream_bases)
    assert [(g.id, g.size) for g in rotated.groups] == [(g.id, g.size) for g in analysis.groups]


def test_what_cannot_be_rotated_is_cut_by_channels_and_says_so(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("a gate on the stream"))
    calibration = calibration_of(analysis, TOKENS)
    made = snpc.plan(analysis, snpc.Budget(0.5, roles=("residual",)), calibration)
    (stream,) = made.analysis.stream_bases
    assert not stream.rotated
    assert "Mul" in stream.reason
    result = snpc.apply(made, tmp_path / "p.onnx")
    (entry,) = snpc.json_report(result)["residual_streams"]
    assert (entry["basis"], entry["not_rotated"]) == ("channels", stream.reason)
    with pytest.raises(UserError, match="known of a rotated stream only"):
        snpc.plan(analysis, snpc.Budget(target="macs=0.8", roles=("residual",)), calibration)


def test_a_target_is_met(tmp_path: Path) -> None:
    """What a rotated stream loses is known, so that it can be ranked."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("layer norm"))
    calibration = calibration_of(analysis, TOKENS)
    made = snpc.plan(analysis, snpc.Budget(target="params=0.6", roles=("residual", "ffn")), calibration)
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert result.after.params <= 0.62 * result.before.params
    assert set(made.slices.keep) & {stream.group for stream in made.analysis.stream_bases}


def test_a_plan_names_only_streams_that_it_cuts(tmp_path: Path) -> None:
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("layer norm"))
    made = snpc.plan(analysis, snpc.Budget(0.5, roles=("residual",)), calibration_of(analysis, TOKENS))
    snpc.save_plan(made, tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    for change in ({"rotated": ["ffn.0"]}, {"rotated": "residual.0"}, {"method": "select"}):
        (tmp_path / "other.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(UserError, match='"rotated"'):
            snpc.load_plan(tmp_path / "other.json", analysis.model)
