"""Runs in a store of MLflow itself: what was asked, what came of it, and files; failures too.

The store is a folder of files, which MLflow takes where MLFLOW_ALLOW_FILE_STORE says so; it needs no database.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import snpc
from snpc.errors import UserError
from tests.command_line import invoke

mlflow = pytest.importorskip("mlflow", reason="pip install 'snpc[mlflow]'")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "runs").as_uri()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    snpc.write_example("digits", folder)
    return folder


def runs(store: str, experiment: str = "snpc") -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=store)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return sorted(found, key=lambda run: run.info.start_time)


def files(store: str, run: Any) -> set[str]:
    return {entry.path for entry in mlflow.MlflowClient(tracking_uri=store).list_artifacts(run.info.run_id)}


@pytest.mark.slow
def test_a_sweep_is_a_run_with_one_inside_for_each_size(digits: Path, tmp_path: Path, store: str) -> None:
    flags = ("--targets", "macs=0.7,0.5", "--calib", digits / "calib.npz", "--calib-samples", 64, "--iterations", 3)
    model = digits / "digits_vit.onnx"
    invoke("sweep", model, *flags, "-o", tmp_path / "out", "--mlflow", store, "--mlflow-models")
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    found = runs(store)
    (whole,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    assert whole.data.params["targets"] == "macs=0.7,0.5" and whole.data.params["model"] == str(model)
    assert whole.data.tags["snpc.version"] == snpc.__version__ and whole.info.status == "FINISHED"
    assert files(store, whole) == {"sweep.json", "sweep.svg"}
    parts = {run.info.run_name: run for run in found if run is not whole}
    assert {run.data.tags["mlflow.parentRunId"] for run in parts.values()} == {whole.info.run_id}
    assert len(parts) == len(table["points"]) == 3
    for point in table["points"]:
        metrics = parts[point["name"]].data.metrics
        assert metrics["macs"] == point["macs"] and metrics["drift"] == pytest.approx(point["drift"])
        assert metrics["latency_ms"] == pytest.approx(point["latency"]) and "accuracy" not in metrics
        assert files(store, parts[point["name"]]) == set(point["files"])


@pytest.mark.slow
@pytest.mark.torch
def test_a_finetuning_logs_its_steps_and_its_report(digits: Path, tmp_path: Path, store: str) -> None:
    pytest.importorskip("torch")
    dense = digits / "digits_vit.onnx"
    half = snpc.prune(dense, tmp_path / "half.onnx", ratio=0.5, method="select", criterion="magnitude").path
    flags = ("--teacher", dense, "--calib", digits / "calib.npz", "--steps", 4, "-o", tmp_path / "tuned.onnx")
    invoke("finetune", half, *flags, "--json", tmp_path / "report.json", "--mlflow", store)
    report = json.loads((tmp_path / "report.json").read_text())
    (run,) = runs(store)
    assert run.data.params["steps"] == "4" and files(store, run) == {"report.json"}
    assert run.data.metrics["loss.last"] == pytest.approx(report["loss"]["last"])
    client = mlflow.MlflowClient(tracking_uri=store)
    steps = client.get_metric_history(run.info.run_id, "loss")
    assert [entry.step for entry in steps] == [1, 2, 3, 4] and all(math.isfinite(entry.value) for entry in steps)


def test_what_fails_is_a_failed_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with (
        pytest.raises(UserError, match="no such thing"),
        snpc.integrations.tracked_run(store, "a run", {"ratio": 0.5}) as run,
    ):
        run.log_numbers({"drift::of logits": 0.25, "nothing": None})
        raise UserError("no such thing")
    (logged,) = runs(store, "mine")
    assert logged.info.status == "FAILED" and logged.data.tags["snpc.error"] == "UserError: no such thing"
    assert logged.data.metrics == {"drift__of logits": 0.25} and logged.data.params == {"ratio": "0.5"}


def test_refusals_are_one_line(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("sweep", digits / "digits_vit.onnx", "--targets", "macs=0.5", "--calib", digits / "calib.npz")
    place = ("-o", tmp_path / "out")
    refused = invoke(*words, *place, "--mlflow-models", code=2)
    assert "--mlflow-models is for --mlflow URI" in refused.stderr
    refused = invoke(*words, *place, "--mlflow", "nonsense://x", code=2)
    assert "MLflow at nonsense://x: " in refused.stderr
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in [name for name in sys.modules if name.startswith("snpc.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    refused = invoke(*words, *place, "--mlflow", "http://localhost:1", code=2)
    assert "pip install 'snpc[mlflow]'" in refused.stderr
