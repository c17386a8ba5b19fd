"""Several sizes of one model: judged, timed, and only those kept that no other one beats."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

import snpc
from snpc.cli import main
from snpc.pipeline.sweep import ORIGINAL_NAME, SweepPoint, mark_pareto_front
from snpc.runtime.evaluation import EvaluationData, OutputMetrics, batch_differences, evaluate
from tests.patching import patch

QUICK = ("--effort", "quick")


def point(name: str, accuracy: float, speedup: float) -> SweepPoint:
    times = {"latency": 10 / speedup, "speedup": speedup, "low": 0.95 * speedup, "high": 1.05 * speedup}
    return SweepPoint(name, (), 1, 1, 1, 1 - accuracy, None, accuracy, **times)


def test_the_front_is_what_no_other_beats() -> None:
    points = [
        point(ORIGINAL_NAME, 0.9, 1.0),
        point("worse and slower", 0.8, 0.9),
        point("worse but faster", 0.85, 1.5),
        point("as good and faster", 0.9, 1.2),
        point("same as the one before", 0.9, 1.2),
        point("better, but not faster beyond the noise", 0.95, 1.03),
    ]
    marked = {p.name for p in mark_pareto_front(points) if p.front}
    assert marked == {"worse but faster", "as good and faster", "same as the one before"}


def test_the_front_without_labels_goes_by_drift() -> None:
    points = [dataclasses.replace(p, accuracy=None) for p in (point("a", 0.9, 1.0), point("b", 0.95, 1.1))]
    assert [p.front for p in mark_pareto_front(points)] == [False, True]


def swept(folder: Path, *arguments: str) -> Result:
    data = ["--calib", str(folder / "calib.npz"), "--calib-samples", "32", "--iterations", "5", "--seed", "0"]
    return CliRunner().invoke(main, ["sweep", str(folder / "digits_vit.onnx"), *data, *arguments])


@pytest.mark.slow
def test_a_sweep_writes_table_plot_and_the_front(tmp_path: Path) -> None:
    snpc.write_example("digits", tmp_path)
    out = tmp_path / "sizes"
    labels = ["--eval", str(tmp_path / "eval.npz"), "--labels", "labels"]
    (tmp_path / "peers.csv").write_text("name,macs,score\ntheirs,5e6,92.5\n")
    plot = ["--plot", str(tmp_path / "front.svg"), "--points", str(tmp_path / "peers.csv")]
    result = swept(tmp_path, "--targets", "macs=0.6,0.25", "-o", str(out), *labels, "--batch", "8", *plot, *QUICK)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "sweep.json").read_text())["points"]
    assert [row["name"] for row in rows] == ["original", "macs=0.6", "macs=0.25"]
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"]
    assert rows[1]["macs"] <= 0.6 * rows[0]["macs"]
    kept = {name for row in rows[1:] for name in row["files"]}
    assert {file.name for file in out.iterdir()} == kept | {"sweep.json"}
    assert all(row["front"] == bool(row["files"]) for row in rows[1:])
    with np.load(tmp_path / "eval.npz") as data:
        for row in rows[1:]:
            for name in row["files"]:
                outputs = snpc.runtime.execution.runners.open_runner(out / name).run({"image": data["image"]})
                assert (outputs["logits"].argmax(-1) == data["labels"]).mean() == pytest.approx(row["accuracy"])
    shown = [element.text for element in ElementTree.parse(tmp_path / "front.svg").iter() if element.text]
    assert shown.count("theirs") == 1 and all(shown.count(row["name"]) == 2 for row in rows)
    assert "macs=0.25" in result.stdout


@pytest.mark.parametrize(
    ("tokens", "roles"), [("auto", "none"), ("auto", "ffn"), ("merge:2@1,2", "qk,vo,ffn")], ids=["auto", "both", "hand"]
)
@pytest.mark.slow
def test_a_sweep_with_fewer_tokens(tokens: str, roles: str, tmp_path: Path) -> None:
    snpc.write_example("digits", tmp_path)
    out = tmp_path / "sizes"
    result = swept(tmp_path, "--targets", "macs=0.6,0.5", "-o", str(out), "--tokens", tokens, "--roles", roles)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "sweep.json").read_text())["points"]
    assert [row["name"] for row in rows] == ["original", "macs=0.6", "macs=0.5"]
    assert rows[0]["tokens"] == ""
    for row, share in zip(rows[1:], (0.6, 0.5), strict=True):
        assert 0.7 * share * rows[0]["macs"] < row["macs"] <= share * rows[0]["macs"]
        assert row["tokens"] == tokens if tokens != "auto" else row["tokens"]
        assert roles != "none" or row["params"] == rows[0]["params"]
        assert row["tokens"] in (out / "sweep.svg").read_text()
    if roles == "none":
        assert rows[1]["tokens"] != rows[2]["tokens"]
    assert "tokens" in result.stdout
    for name in {name for row in rows[1:] for name in row["files"]}:
        names = {node.name for node in onnx.load(out / name).graph.node}
        assert any(n.startswith("tokens_") for n in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "macs=0.0001"], "cannot be reached"),
        (["--targets", "macs=0.5,0.5"], "once"),
        (["--targets", "macs=0.5", "--ratio", "0.5"], "--ratio"),
        (["--targets", "macs=0.5", "--precision", "fp16"], "--build"),
        (["--targets", "macs=0.5", "--labels", "labels"], "--eval"),
        (["--targets", "macs=0.5", "--build", "ncnn"], "choose from"),
        (["--targets", "macs=0.5", "--build", "trt-rtx"], "does not run engines"),
        (["--targets", "macs=0.5", "--max-drift", "0.1"], "--max-drift"),
        (["--targets", "params=0.5", "--roles", "none"], "--tokens auto"),
        (["--targets", "macs=0.5", "--roles", "none", "--tokens", "merge:1"], "--tokens auto"),
        (["--targets", "macs=0.5,params=0.5", "--tokens", "auto"], "needs a target in MACs"),
        (["--targets", "macs=0.5", "--tokens", "halve:1"], "no method"),
    ],
)
def test_what_a_sweep_refuses(tmp_path: Path, arguments: list[str], said: str) -> None:
    snpc.write_example("digits", tmp_path)
    result = swept(tmp_path, *arguments)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("digits_vit-sweep/*.onnx"))


@pytest.mark.parametrize("tokens", ["none", "merge:2@1,2"])
@pytest.mark.slow
def test_a_sweep_runs_the_original_once_to_verify_and_judges_by_that(
    tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snpc.write_example("digits", tmp_path)
    model, runs = tmp_path / "digits_vit.onnx", list[Path]()
    run_original = sys.modules["snpc.pipeline.verify"].run_original

    def counted(analysis: snpc.Analysis, original: Path, *others: Any) -> Any:
        runs.append(original)
        return run_original(analysis, original, *others)

    patch(monkeypatch, "snpc.pipeline.verify.run_original", counted)
    out = tmp_path / "sizes"
    result = swept(tmp_path, "--targets", "macs=0.6,0.5", "-o", str(out), "--tokens", tokens, *QUICK)
    assert result.exit_code == 0, result.output
    assert runs == [model]
    analysis = snpc.analyze(snpc.load(model))
    held_out = snpc.load_calibration(tmp_path / "calib.npz", analysis.model.inputs, samples=32).held_out
    assert held_out is not None
    rows = json.loads((out / "sweep.json").read_text())["points"]
    assert rows[0]["drift"] == 0 and rows[0]["agreement"] == 1
    metrics = OutputMetrics.of(analysis)
    for row in rows[1:]:
        for name in row["files"]:
            dense, cut = (evaluate(file, EvaluationData(held_out)).outputs for file in (model, out / name))
            (found,) = batch_differences(dense, cut, metrics)
            assert row["drift"] == pytest.approx(found.drift, rel=1e-3)
            assert row["agreement"] == found.agreement
