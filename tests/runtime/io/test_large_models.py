"""Models larger than memory, scaled down: weights stay in their file, are read one at a time, and are not run where
they do not fit. ``benchmarks/huge.py`` does it at full size."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import snpc
from snpc.runtime.batches import streamed_model
from snpc.runtime.execution import memory
from snpc.runtime.execution.session import open_session
from snpc.runtime.io import read_model
from snpc.runtime.sensitivity import segmented_model
from snpc.runtime.statistics import unit_weights as numbers
from tests.command_line import invoke
from tests.models.layouts import Llama, write_llama
from tests.patching import patch

SMALL = Llama(layers=3, width=64, heads=4, kv_heads=2, hidden=96, vocabulary=50, positions=64)
FLAGS = ("--method", "select", "--criterion", "magnitude", "--ratio", 0.25)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), SMALL)


def test_it_is_pruned_and_written_beside(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    invoke("prune", llama, *FLAGS, "--uniform", "-o", target)
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert set(tmp_path.iterdir()) == {target, data}
    onnx.checker.check_model(str(target))
    before, after = snpc.analyze(snpc.load(llama)), snpc.analyze(snpc.load(target))
    assert after.cost.params < 0.85 * before.cost.params
    assert {g.size for g in after.groups if g.role == "ffn"} == {72}


def test_weights_stay_in_their_file(llama: Path) -> None:
    analysis = snpc.analyze(snpc.load(llama))
    large = [
        v.const_value for v in analysis.traced_graph.model.graph.initializers.values() if v.const_value.nbytes > 4096
    ]
    assert len(large) > 15
    assert all(isinstance(t, ir.ExternalTensor) for t in large)


def test_scores_read_one_weight_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotary tables tie the widths of all layers into one group: its weights together are those of the model."""
    alive: list[int] = []
    unit_rows = numbers.unit_rows

    def counted(*arguments: object) -> np.ndarray:
        rows = unit_rows(*arguments).view(Noted)
        alive.append(rows.nbytes)
        Noted.now += rows.nbytes
        Noted.most = max(Noted.most, Noted.now)
        return rows

    monkeypatch.setattr(numbers, "unit_rows", counted)
    snpc.score(snpc.analyze(snpc.load(llama)), "magnitude")
    assert len(alive) > 15
    assert Noted.most <= 2 * max(alive)


class Noted(np.ndarray):
    """An array that says when it goes."""

    now = 0
    most = 0

    def __del__(self) -> None:
        if self.base is not None and not isinstance(self.base, Noted):
            Noted.now -= self.nbytes


def test_a_file_over_the_limit_of_a_message_is_written_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the original was: with its weights inside, in a model that may be larger than a message."""
    patch(monkeypatch, "snpc.runtime.io.save.PROTOBUF_LIMIT", 1 << 16)
    inline = tmp_path / "inline.onnx"
    onnx.save(onnx.load(write_llama(tmp_path / "llama", SMALL)), inline)
    invoke("prune", inline, *FLAGS, "-o", tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert data.stat().st_size > 1 << 16
    assert (tmp_path / "out.onnx").stat().st_size < 1 << 16
    assert snpc.load(tmp_path / "out.onnx").external


def test_what_does_not_fit_is_run_segment_by_segment(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is compared, and found, as in one session."""
    reports = []
    for limit in ("1GB", "100kB"):
        sessions = patch_sessions(monkeypatch)
        report = tmp_path / f"{limit}.json"
        invoke("prune", llama, *FLAGS, "-o", tmp_path / "out.onnx", "--json", report, "--memory-limit", limit)
        reports.append(json.loads(report.read_text())["verify"])
        assert (max(sessions) > 300_000) == (limit == "1GB")
    whole, streamed = reports
    assert streamed["max_abs_diff"] is not None
    assert streamed["max_abs_diff"] <= 2 * whole["max_abs_diff"] + 1e-3
    assert drift_of(streamed) == pytest.approx(drift_of(whole), rel=0.02)
    assert [streamed[key] for key in ("structure", "compared", "not_run")] == [
        whole[key] for key in ("structure", "compared", "not_run")
    ]


def test_where_no_segment_fits_nothing_is_run_and_that_is_said(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 20_000)
    target, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = invoke("prune", llama, *FLAGS, "-o", target, "--json", report)
    said = " ".join(result.stdout.split())
    assert "not run: running the model takes about" in said
    assert "outputs were not compared" in said
    assert "verified" not in said
    verdict = json.loads(report.read_text())["verify"]
    assert verdict["max_abs_diff"] is None
    assert any("strict shape inference" in line for line in verdict["structure"])


@pytest.mark.parametrize("effort", ["quick", pytest.param("normal", marks=pytest.mark.slow)])
def test_weights_are_fitted_without_a_session_of_the_whole(
    effort: snpc.Effort, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the data to the verified file, as where the model fits: the same widths, and outputs as close."""
    ids = np.random.default_rng(0).integers(0, 50, (24, 16))
    needed = memory.session_bytes(memory.model_weights(snpc.load(llama).graph))
    results = []
    for budget in (needed, needed // 2):
        monkeypatch.setattr(streamed_model, "weight_budget", lambda _, budget=budget: budget)
        monkeypatch.setattr(segmented_model, "weight_budget", lambda _, budget=budget: budget)
        sessions = patch_sessions(monkeypatch)
        calibration = snpc.load_calibration({"input_ids": ids}, snpc.load(llama).inputs, samples=16, batch=4)
        path = tmp_path / f"{budget}.onnx"
        results.append(
            snpc.prune(llama, path, calibration=calibration, target="macs=0.8", effort=effort, tokens="none")
        )
        assert (max(sessions) < 0.9 * needed) == (budget < needed)
    whole, streamed = results
    widths = [{name: len(rows[0]) for name, rows in result.plan.keep.items()} for result in results]
    assert widths[0] == widths[1]
    assert set(streamed.closed_forms.values()) >= {"refit", "low_rank_vo"}
    assert streamed.verification.equals_mask
    assert streamed.quality.drift == pytest.approx(whole.quality.drift, rel=0.05)


WHOLE: dict[str, dict[str, Any]] = {
    "choose the criterion mixed": {"target": "macs=0.8", "criterion": "taylor"},
    "leave the role residual out": {"ratio": 0.2, "roles": ("residual", "ffn")},
    "leave the role out": {"target": "macs=0.8", "roles": ("layer",)},
    "give --target macs=R": {"target": "latency=0.8"},
    "leave --cluster out": {"target": "macs=0.8", "cluster": True},
}


@pytest.mark.parametrize("advice", WHOLE)
def test_what_runs_the_whole_model_is_refused_before_anything_runs(
    advice: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit is less than its weights take; the line says what to ask for."""
    analysis, options = snpc.analyze(snpc.load(llama)), dict(WHOLE[advice])
    ids = np.random.default_rng(0).integers(0, 50, (8, 16))
    calibration = snpc.load_calibration({"input_ids": ids}, analysis.model.inputs)
    needed = memory.session_bytes(memory.model_weights(analysis.traced_graph.model))
    criterion, workers = options.pop("criterion", None), ThreadPoolExecutor(1)
    if "target" in options:
        options["target"] = snpc.parse_target(options["target"])
    execution = snpc.Execution(memory_limit=needed - 1, executor=workers if options.pop("cluster", False) else None)
    sessions = patch_sessions(monkeypatch)
    with pytest.raises(snpc.UserError, match=f"the whole model at once, .* is the --memory-limit: .*{advice}"):
        snpc.plan(analysis, snpc.Budget(**options), calibration, criterion=criterion, execution=execution)
    assert not sessions


def patch_sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights of every session that is opened from now on."""
    sizes: list[int] = []

    def noted(path: Path, **options: Any) -> Any:
        sizes.append(memory.session_bytes(memory.model_weights(read_model(path))))
        return open_session(path, **options)

    patch(monkeypatch, "snpc.runtime.execution.temporary_session.open_session", noted)
    return sizes


def drift_of(verdict: dict[str, Any]) -> float:
    (difference,) = verdict["quality"]["differences"]
    return float(difference["drift"])
