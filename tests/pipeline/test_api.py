"""The public API: the one call, the steps, and every type of model that goes in and comes out."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

import snpc
from tests.command_line import CALIB, VIT

RATIO = 0.5


def parameters(proto: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer if len(tensor.dims) > 1)


def weights(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in proto.graph.initializer}


@pytest.fixture(scope="module")
def pruned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "half.onnx"
    snpc.prune(VIT, path, ratio=RATIO, method="select", criterion="magnitude")
    return path


INPUTS: dict[str, Any] = {
    "path": lambda: VIT,
    "text": lambda: str(VIT),
    "onnx": lambda: onnx.load(VIT),
    "onnx_ir": lambda: ir.load(VIT),
    "graphsurgeon": lambda: gs.import_onnx(onnx.load(VIT)),
}
OUTPUTS: dict[str, Any] = {
    "path": lambda model: model,
    "text": lambda model: model,
    "onnx": lambda model: model,
    "onnx_ir": ir.to_proto,
    "graphsurgeon": gs.export_onnx,
}
TYPES = {
    "path": onnx.ModelProto,  # nothing was written, so there is no path to return
    "text": onnx.ModelProto,
    "onnx": onnx.ModelProto,
    "onnx_ir": ir.Model,
    "graphsurgeon": gs.Graph,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_model_comes_back_as_the_type_that_came_in(kind: str, pruned_file: Path) -> None:
    result = snpc.prune(INPUTS[kind](), ratio=RATIO, method="select", criterion="magnitude")
    assert isinstance(result.model, TYPES[kind])
    proto = OUTPUTS[kind](result.model)
    assert proto is not None
    onnx.checker.check_model(proto)
    assert weights(proto) == weights(onnx.load(pruned_file))
    assert result.verification.max_abs_diff is not None


@pytest.mark.parametrize("kind", ["onnx", "onnx_ir", "graphsurgeon"])
def test_a_model_in_memory_is_not_changed_and_can_be_written(kind: str, tmp_path: Path) -> None:
    model = INPUTS[kind]()
    before = OUTPUTS[kind](model).SerializeToString()
    result = snpc.prune(model, tmp_path / "half.onnx", ratio=RATIO, method="select", criterion="magnitude")
    assert OUTPUTS[kind](model).SerializeToString() == before
    assert result.path == tmp_path / "half.onnx"
    assert isinstance(result.model, TYPES[kind])
    assert [path.name for path in tmp_path.iterdir()] == ["half.onnx"]


def test_a_path_gives_the_path_of_what_was_written(tmp_path: Path) -> None:
    result = snpc.prune(VIT, str(tmp_path / "half.onnx"), ratio=RATIO, method="select", criterion="magnitude")
    assert result.model == tmp_path / "half.onnx"


def test_temporary_files_go_with_their_values() -> None:
    model = snpc.load(onnx.load(VIT))
    result = snpc.apply(snpc.plan(snpc.analyze(model), snpc.Budget(RATIO)))
    files = [model.path, result.path]
    assert all(path.is_file() for path in files)
    del model, result
    gc.collect()
    assert not any(path.parent.exists() for path in files)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(snpc.UserError, match=r"onnx\.ModelProto"):
        snpc.load(np.zeros(3))  # type: ignore[arg-type]


def test_weights_in_another_file_need_the_path(tmp_path: Path) -> None:
    onnx.save(onnx.load(VIT), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(snpc.UserError, match="lies in another file"):
        snpc.load(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    assert snpc.load(ir.load(tmp_path / "m.onnx")).inputs == snpc.load(VIT).inputs


def test_the_one_call_is_the_steps(tmp_path: Path) -> None:
    once = snpc.prune(VIT, tmp_path / "once.onnx", ratio=RATIO, calibration=CALIB)
    model = snpc.load(VIT)
    analysis = snpc.analyze(model)
    calibration = snpc.load_calibration(CALIB, model.inputs)
    plan = snpc.plan(analysis, snpc.Budget(RATIO), calibration)
    steps = snpc.apply(plan, tmp_path / "steps.onnx")
    assert once.path.read_bytes() == steps.path.read_bytes()
    assert once.plan.method == "auto"
    assert once.closed_forms == steps.closed_forms != {}
    verdict = snpc.verify(VIT, once.path, plan=plan)
    assert verdict.max_abs_diff is not None and verdict.max_abs_diff < 1e-4


@pytest.mark.parametrize("tokens", ["topk:4@2", "auto"])
@pytest.mark.slow
def test_the_one_call_reduces_tokens(tokens: str) -> None:
    calibration = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32)
    # widths alone do not come so far
    result = snpc.prune(VIT, target="macs=0.6", max_ratio="0.2", tokens=tokens, calibration=calibration)
    assert result.plan.analysis.reduction is not None
    assert result.after.macs <= 0.6 * result.before.macs
    assert any("tokens" in note for note in result.verification.structure)


def test_a_plan_goes_through_a_file(tmp_path: Path) -> None:
    model = snpc.load(VIT)
    plan = snpc.plan(snpc.analyze(model), snpc.Budget(target=snpc.parse_target("params=0.6"), max_ratio={"ffn": 0.5}))
    snpc.save_plan(plan, tmp_path / "plan.json")
    slices = snpc.load_plan(tmp_path / "plan.json", model)
    assert dict(slices.keep) == dict(plan.slices.keep)
    assert (slices.options["target"], slices.options["max_ratio"]) == ("params=0.6", "ffn=0.5")
    again = snpc.apply(snpc.complete_plan(slices), tmp_path / "again.onnx")
    assert again.path.read_bytes() == snpc.apply(plan, tmp_path / "once.onnx").path.read_bytes()


def test_no_budget_cuts_no_width(tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    result = snpc.apply(snpc.plan(analysis, None), tmp_path / "same.onnx")
    assert not result.plan.keep
    assert result.after.macs == analysis.cost.macs - analysis.dead_macs


@pytest.mark.parametrize(
    ("text", "kind", "share", "ms"),
    [
        ("macs=0.6", "macs", 0.6, None),
        ("latency=12ms", "latency", 1.0, 12.0),
        ("bytes=0.333333333", "bytes", 1 / 3, None),
    ],
)
def test_budgets_are_parsed_at_the_door(text: str, kind: str, share: float, ms: float | None) -> None:
    target = snpc.Budget(target=text).target  # type: ignore[arg-type]
    assert isinstance(target, snpc.ResourceTarget)
    assert (target.kind, target.ms) == (kind, ms)
    assert target.share == pytest.approx(share)
    assert snpc.parse_target(str(target)) == target
    ratio = snpc.Budget(ratio=0.5, max_ratio="0.25")  # type: ignore[arg-type]
    assert ratio.max_ratio is not None and set(ratio.max_ratio.values()) == {0.25}
    assert ratio.to_options()["max_ratio"] == "0.25"


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(snpc.UserError, match="share of the dense model"):
        snpc.Budget(target=snpc.ResourceTarget("macs", 1.5))


@pytest.mark.parametrize("options", [
    {"ratio": 0.5},
    {"ratio": 0.5, "criterion": "mixed"},
    {"target": "macs=0.7", "tokens": "merge:2@1-2"},
], ids=str)  # fmt: skip
def test_nothing_is_fitted_to_held_out_samples(options: dict[str, Any], tmp_path: Path) -> None:
    """Other values of these samples leave the written model as it is, and its measured quality only changes."""
    images = np.load(CALIB)["image"][:40]
    inputs = snpc.load(VIT).inputs
    first = snpc.load_calibration({"image": images}, inputs)
    assert first.held_out is not None
    rows = np.concatenate([part.sample_ids for batch in first.held_out.batch_plan for part in batch])
    others = images.copy()
    others[rows] = 1 - others[rows] * 3
    second = snpc.load_calibration({"image": others}, inputs)
    results = [
        snpc.prune(VIT, tmp_path / f"{k}.onnx", calibration=data, roles=("ffn", "vo"), **options)
        for k, data in enumerate((first, second))
    ]
    assert results[0].path.read_bytes() == results[1].path.read_bytes()
    assert results[0].quality.held_out and results[0].quality.samples == len(rows) == 4
    assert results[0].quality.differences != results[1].quality.differences


def test_statistics_of_other_samples_may_include_those_held_out(tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    budget = snpc.Budget(ratio=0.3, roles=("ffn",))
    here, elsewhere = (snpc.load_calibration(CALIB, analysis.model.inputs, samples=32, seed=seed) for seed in (0, 1))
    measured = snpc.plan(analysis, budget, here, method="parallel")
    again = snpc.plan(analysis, budget, elsewhere, method="parallel", statistics=measured.statistics)
    same, other = (snpc.apply(plan, tmp_path / "out.onnx").quality for plan in (measured, again))
    assert same.held_out and same.source.startswith("64 held-out samples")
    assert not other.held_out and "statistics may include" in other.source
