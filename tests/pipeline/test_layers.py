"""Whole layers go: the file lacks them, the plan says which, and verification finds a wrong removal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.passes.grouping import TracedGraph
from snpc.passes.sublayers import Substitutes, without_sublayers
from snpc.types import Sublayer
from tests.command_line import CALIB, VIT, invoke, reported
from tests.patching import patch

DATA = ("--calib", CALIB, "--calib-samples", 32, "--calib-batch", 32)


@pytest.fixture(scope="module")
def data() -> snpc.Calibration:
    """What ``DATA`` says to the command line."""
    return snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32, batch=32)


def test_layers_go_from_the_file(data: snpc.Calibration, tmp_path: Path) -> None:
    target = tmp_path / "short.onnx"
    result = snpc.prune(VIT, target, calibration=data, target="macs=0.8", roles=("layer",))
    removal = result.plan.analysis.removal
    assert removal is not None and removal.names
    assert result.after.macs <= 0.8 * result.before.macs
    assert result.after.params < result.before.params
    names = {name for node in onnx.load(target).graph.node for name in node.output}
    assert not names & {sublayer.branch for sublayer in removal.sublayers}
    assert any("replaced in place" in check for check in result.verification.structure)
    assert result.verification.max_abs_diff is not None


def test_kept_layers_are_refitted_to_the_whole_stream(data: snpc.Calibration, tmp_path: Path) -> None:
    """The outputs are nearer to the original's than those of the layers that a plan without refitting takes."""
    drifts = {}
    for method in ("select", "auto"):
        options = {"method": method} if method == "select" else {}
        result = snpc.prune(
            VIT,
            tmp_path / f"{method}.onnx",
            calibration=data,
            ratio=0.25,
            roles=("layer",),
            **options,  # type: ignore[arg-type]
        )
        assert result.plan.analysis.removal is not None and len(result.plan.analysis.removal.names) == 2
        drifts[method] = result.quality.drift
    assert drifts["auto"] < 0.95 * drifts["select"]


def test_a_ratio_takes_layers_and_units(data: snpc.Calibration, tmp_path: Path) -> None:
    result = snpc.prune(VIT, tmp_path / "both.onnx", calibration=data, ratio=0.25, roles=("layer", "ffn"))
    analysis = result.plan.analysis
    assert analysis.removal is not None and len(analysis.removal.names) == 2  # of eight
    ffn = [g for g in analysis.groups if g.role == "ffn"]
    cut = sum(g.size - result.plan.kept_width(g) for g in ffn)
    assert cut == pytest.approx(0.25 * sum(g.size for g in ffn), abs=1)


@pytest.mark.parametrize("options", [(), ("--method", "select")])
def test_a_plan_file_says_which_layers_go(options: tuple[str, ...], tmp_path: Path) -> None:
    plan, direct, applied = (tmp_path / name for name in ("plan.json", "direct.onnx", "applied.onnx"))
    words = ("--roles", "layer", "--ratio", 0.25, *DATA, *options)
    report = reported("prune", VIT, *words, "--plan", plan, "-o", direct)
    entries = json.loads(plan.read_text())["layers"]
    assert {entry["name"] for entry in report["layers"]} == set(entries)
    for entry in report["layers"]:
        assert isinstance(entries[entry["name"]], dict) == (entry["replaced_by"] == "map")
    invoke("apply", VIT, plan, *DATA, "-o", applied)
    assert applied.read_bytes() == direct.read_bytes()
    assert "replaced in place" in invoke("verify", VIT, direct, "--plan", plan, *DATA).stdout
    printed = invoke("plan", VIT, *words, "-o", tmp_path / "again.json").stdout
    assert "layers gone: " in printed
    assert ("a map of its tokens" in printed) == ("map" in {entry["replaced_by"] for entry in report["layers"]})


def test_an_edited_plan(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    invoke("plan", VIT, "--roles", "layer", "--ratio", 0.25, *DATA, "-o", plan)
    data = json.loads(plan.read_text())
    for layers, words in (
        ({"none": ""}, "has no layer 'none'"),
        ({next(iter(data["layers"])): "x"}, "numbers as text"),
    ):
        plan.write_text(json.dumps({**data, "layers": layers}))
        with pytest.raises(UserError, match=words):
            snpc.load_plan(plan, snpc.load(VIT))


def test_a_wrong_removal_is_found(data: snpc.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that takes another layer with it is not that with the chosen layers replaced in place."""
    sublayers = snpc.analyze(snpc.load(VIT)).sublayers

    def greedy(source: TracedGraph, gone: Sequence[Sublayer], constants: Substitutes) -> tuple[ir.Model, object]:
        more = next(s for s in sublayers if s.name not in {g.name for g in gone})
        return without_sublayers(source, [*gone, more], constants)

    patch(monkeypatch, "snpc.passes.analyze.without_sublayers", greedy)
    with pytest.raises(CheckFailed, match="differs from that in which they are replaced in place"):
        snpc.prune(VIT, tmp_path / "wrong.onnx", calibration=data, ratio=0.25, roles=("layer",))
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratio", 0.25), "give --calib"),
        (("--target", "macs=0.7", "--calib", CALIB, "--tokens", "auto"), "give --roles all,layer"),
        (("--max-drift", 0.1, "--calib", CALIB), "limits of quality take roles of widths"),
    ],
)
def test_requests_that_are_refused(words: tuple[object, ...], said: str) -> None:
    assert said in invoke("prune", VIT, "--roles", "layer", *words, code=2).output


def test_a_sweep_takes_no_layers(tmp_path: Path) -> None:
    words = ("--roles", "layer", "--targets", "macs=0.8", "--calib", CALIB, "-o", tmp_path)
    assert "leave out the role layer" in invoke("sweep", VIT, *words, code=2).output
