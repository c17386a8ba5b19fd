"""Token reduction. The oracle: fewer tokens give what the same tokens taken out in place give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main
from snpc.errors import CheckFailed, UserError
from snpc.graph import choose_dim_sizes
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import (
    check_token_reduction,
    compare_with_oracle,
    file_decisions,
    self_deciding_model,
)
from snpc.runtime.execution.execution import Execution
from snpc.runtime.io.save import save
from snpc.tokens import TOKEN_METHODS
from snpc.tokens.cost import token_cost
from snpc.tokens.inplace_oracle import oracle_feeds
from snpc.tokens.methods import StepSettings
from snpc.tokens.reduction import reduce_tokens
from snpc.tokens.step import TokenStep
from tests.models.encoders import Array, Encoder, Exit, forward
from tests.models.exports import EXPORTS
from tests.oracle import analysis_of, feeds_of, run

FORMS = {
    "plain": Encoder(),
    "opset 13": Encoder(opset=13),
    "opset 18": Encoder(opset=18),
    "literal sizes": Encoder(literal=True),
    "batch and heads in one axis": Encoder(merged=True, literal=True),
    "pooled": Encoder(exit="mean"),
    "class token and pool": Encoder(exit="both"),
    "class token and pool, opset 18": Encoder(exit="both", opset=18),
    "fp16": Encoder(half=True),
    "fused": Encoder(fused=True, opset=23),
    "fused and pooled": Encoder(fused=True, opset=23, exit="mean"),
    "summed": Encoder(exit="sum"),
    "keys and values summed in the last block": Encoder(linear=True),
}
REDUCTIONS = ("merge:2", "guided:2", "topk:0.7", "fuse:0.7@2-3", "merge:3@1+topk:2@2+fuse:3@3")


def analysis(encoder: Encoder, folder: Path) -> Analysis:
    path = folder / "encoder.onnx"
    onnx.save(encoder.model(), path)
    return snpc.analyze(snpc.load(path))


def written(reduced: Analysis, folder: Path) -> Path:
    path = folder / "reduced.onnx"
    save(finalize(self_deciding_model(reduced)), path)
    return path


@pytest.mark.parametrize("spec", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_fewer_tokens_are_the_same_tokens_taken_out_in_place(form: str, spec: str, tmp_path: Path) -> None:
    encoder = FORMS[form]
    reduced = reduce_tokens(analysis(encoder, tmp_path), spec)
    path = written(reduced, tmp_path)
    batches = [encoder.feeds(3, seed) for seed in (1, 2)] + [encoder.feeds(1, 3)]
    assert reduced.reduction is not None
    decided = list(file_decisions(path, reduced.reduction.decisions, batches))
    tolerance = 2e-2 if encoder.half else 1e-5
    for difference in compare_with_oracle(reduced, batches, decided, Execution()):
        assert difference.relative < tolerance
    for feeds in batches:
        plain, fast = run(path, feeds), run(path, feeds, "all")
        assert np.isfinite(plain[0].astype(np.float64)).all() and plain[0].shape == (len(feeds["x"]), 5)
        assert np.abs(plain[0].astype(np.float64) - fast[0]).max() < (0.2 if encoder.half else 1e-4)
        assert not np.allclose(plain[0], run(reduced.model.path, feeds)[0], atol=1e-3), "nothing was reduced"


@pytest.mark.parametrize("form", ["class", "mean", "real"])
def test_masks_lose_what_the_tokens_lose(form: Exit, tmp_path: Path) -> None:
    encoder = Encoder(masked=True, exit=form)
    found = analysis(encoder, tmp_path)
    reduced = reduce_tokens(found, "topk:3@1-2+topk:2@3")
    path = written(reduced, tmp_path)
    batches = [encoder.feeds(3, seed) for seed in (1, 2)]
    assert check_token_reduction(reduced, path, batches, 1e-5)
    other = {**batches[0], "mask": np.ones_like(batches[0]["mask"])}
    assert np.abs(run(path, batches[0])[0] - run(path, other)[0]).max() > 1e-2
    with pytest.raises(UserError, match="an entry for each token; use topk"):
        reduce_tokens(found, "merge:2")


BESIDE = {
    "an earlier block's tokens": (Encoder(skip=True), [False, True, True]),
    "a table over pairs of positions": (Encoder(bias=True), [True, True, True]),
    "positions in every block": (Encoder(again=True), [True, True, True]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_has_an_entry_for_each_token_loses_what_the_tokens_lose(name: str, tmp_path: Path) -> None:
    encoder, meets = BESIDE[name]
    found = analysis(encoder, tmp_path)
    assert [bool(point.side_input) for point in found.tokens.points] == meets
    reduced = reduce_tokens(found, "topk:3@1-2+topk:2@3")
    assert check_token_reduction(reduced, written(reduced, tmp_path), [encoder.feeds()], 1e-5)
    with pytest.raises(UserError, match="an entry for each token; use topk"):
        reduce_tokens(found, "merge:2@2")


def test_the_check_sees_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: here what is taken out in place belongs to another sample."""
    encoder = Encoder()
    reduced = reduce_tokens(analysis(encoder, tmp_path), "topk:5@2")
    path = written(reduced, tmp_path)
    assert check_token_reduction(reduced, path, [encoder.feeds()], 1e-5)

    def mixed_up(steps: Sequence[TokenStep], decided: Mapping[str, Array], count: int) -> dict[str, Array]:
        return oracle_feeds(steps, {name: np.roll(array, 1, 0) for name, array in decided.items()}, count)

    monkeypatch.setattr("snpc.pipeline.token_decisions.oracle_feeds", mixed_up)
    with pytest.raises(CheckFailed, match="taken out in place"):
        check_token_reduction(reduced, path, [encoder.feeds()], 1e-5)


@pytest.mark.parametrize("encoder", [Encoder(), Encoder(exit="mean"), Encoder(fused=True, opset=23)])
def test_topk_drops_what_numpy_drops(encoder: Encoder, tmp_path: Path) -> None:
    reduced = reduce_tokens(analysis(encoder, tmp_path), "topk:3@1+topk:2@3")
    for seed in range(3):
        feeds = encoder.feeds(4, seed)
        (found,) = run(written(reduced, tmp_path), feeds)
        expected = forward(encoder, feeds["x"], {1: 3, 3: 2})
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(found - forward(encoder, feeds["x"], {})).max() > 1e-2


@pytest.mark.parametrize("spec", ["merge:0", "topk:1.0", "fuse:0", "merge:0@1-2+topk:1.0@3"])
def test_no_tokens_less_is_the_same_to_the_bit(spec: str, tmp_path: Path) -> None:
    encoder = Encoder()
    plain = analysis(encoder, tmp_path)
    reduced = reduce_tokens(plain, spec)
    feeds = encoder.feeds()
    out = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx").path
    dense = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(plain, "none", {}, {})), tmp_path / "dense.onnx").path
    assert np.array_equal(run(out, feeds)[0], run(dense, feeds)[0])


@pytest.mark.parametrize("gone", [1, 3, 6])
def test_merging_conserves_the_weighted_mean(gone: int) -> None:
    rng = np.random.default_rng(gone)
    setting = StepSettings(14, 1, gone)
    even = rng.permuted(np.tile(np.arange(7), (3, 1)), axis=1)
    decided = [even, rng.integers(0, 6, (3, gone))]
    sizes = rng.integers(1, 5, (3, 14)).astype(float)
    values = rng.standard_normal((3, 14, 8))
    matrix, after = TOKEN_METHODS["merge"].matrix(setting, decided, sizes)
    assert np.allclose(matrix.sum(2), 1)
    assert np.allclose(after.sum(1), sizes.sum(1))
    assert np.allclose(np.einsum("bi,bid->bd", after, matrix @ values), np.einsum("bi,bid->bd", sizes, values))


def test_merging_conserves_the_weighted_mean_in_the_graph(tmp_path: Path) -> None:
    encoder = Encoder()
    reduced = reduce_tokens(analysis(encoder, tmp_path), "merge:4@1-2")
    model = ir.load(written(reduced, tmp_path))
    values = {str(v.name): v for n in model.graph for v in n.outputs}
    shown = {}
    for step in reduced.reduction.steps:  # type: ignore[union-attr]
        log = next(n for n in model.graph if n.op_type == "Log" and str(n.name).startswith(f"{step.prefix}_weigh"))
        size = log.inputs[0]
        assert size is not None
        tokens = next(n.outputs[0] for n in model.graph if n.op_type == "Div" and str(n.name).startswith(step.prefix))
        behind = next(iter(tokens.consumers()))
        tokens = behind.outputs[0] if str(behind.name).startswith(step.prefix) else tokens  # those that stay beside it
        shown[step.prefix] = (values[step.point.value], tokens, size)
    model.graph.outputs.extend(v for vs in shown.values() for v in vs)
    save(model, tmp_path / "shown.onnx")
    session = ort.InferenceSession(str(tmp_path / "shown.onnx"), providers=["CPUExecutionProvider"])
    names = [str(v.name) for vs in shown.values() for v in vs]
    before1, after1, size1, before2, after2, size2 = session.run(names, encoder.feeds())
    assert np.allclose((after1 * size1).sum(1), before1.sum(1), atol=1e-4)
    assert np.allclose((after2 * size2).sum(1), (before2 * size1).sum(1), atol=1e-4)
    assert size2.sum(1).tolist() == [[13.0]] * 3


# -- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_timm__ts17", "gpt2__ts17", "llama__ts17", "bert__ts17"])
def test_exports_with_pinned_tokens_are_left_alone(name: str) -> None:
    found = analysis_of(name)
    assert not found.tokens.points and found.tokens.pins
    with pytest.raises(UserError, match="cannot be reduced"):
        reduce_tokens(found, "topk:0.5")


@pytest.mark.parametrize("name", [n for n in EXPORTS if n.startswith(("vit_timm", "vit_hf"))])
def test_exported_vision_transformers(name: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    assert [(p.count, p.leading) for p in found.tokens.points] == [(17, 1)]
    for spec in ("merge:5", "topk:0.6", "fuse:0.6"):
        if found.tokens.points[0].scores is None and spec != "merge:5":
            continue
        reduced = reduce_tokens(found, spec)
        _, said = check_token_reduction(reduced, written(reduced, tmp_path), [feeds_of(name)], 1e-4)
        assert "in place" in said


# -- costs, plans, commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["merge:2", "topk:0.7", "fuse:0.7"])
@pytest.mark.parametrize("form", ["plain", "pooled", "fused"])
def test_costs_by_schedule_are_those_of_the_file(form: str, spec: str, tmp_path: Path) -> None:
    plain = analysis(FORMS[form], tmp_path)
    reduced = reduce_tokens(plain, spec)
    steps = {s.point.block: s.settings for s in reduced.reduction.steps}  # type: ignore[union-attr]
    cost = token_cost(plain, choose_dim_sizes(plain.model.graph)[1])
    count, settings = plain.tokens.points[0].count, []
    for point in plain.tokens.points:
        settings.append(steps.get(point.block, StepSettings(count, point.leading, 0)))
        count -= settings[-1].removed
    found = cost.macs(settings, TOKEN_METHODS[spec.partition(":")[0]])
    result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
    assert found == result.after.macs == reduced.cost.macs - reduced.dead_macs < plain.cost.macs


@pytest.mark.slow
def test_widths_are_cut_on_the_reduced_graph(tmp_path: Path) -> None:
    encoder = Encoder(width=32)
    found = analysis(encoder, tmp_path)
    data = snpc.load_calibration({"x": encoder.feeds(24)["x"]}, found.model.inputs, batch=8)
    reduced = reduce_tokens(found, "merge:2")
    decision = snpc.plan(reduced, snpc.Budget(target="macs=0.5"), calibration=data)
    result = snpc.apply(decision, tmp_path / "out.onnx")
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.verification.equals_mask and all(d.relative < 1e-4 for d in result.verification.equals_mask)
    assert any("in place" in said for said in result.verification.structure)
    text = snpc.plan_to_json(decision.slices)
    again = snpc.plan_from_json(text, reduced, "plan")
    completed = snpc.complete_plan(again, data)
    snpc.verify(found.model.path, result.path, plan=completed)
    with pytest.raises(UserError, match="those of the analyzed model are None"):
        snpc.plan_from_json(text, found, "plan")
    with pytest.raises(CheckFailed):  # the dense model decides nothing
        snpc.verify(found.model.path, found.model.path, plan=completed)


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    encoder = Encoder(depth=6, patches=16)
    analysis(encoder, tmp_path)
    model, out, plan = (str(tmp_path / n) for n in ("encoder.onnx", "out.onnx", "plan.json"))
    np.savez(tmp_path / "calib.npz", x=encoder.feeds(24)["x"])
    calib = ("--calib", str(tmp_path / "calib.npz"))
    code, text = command("prune", model, "--roles", "none", "--tokens", "merge:2@1-3", "-o", out, "--plan", plan)
    assert code == 0 and "merge:2@1,2,3" in text, text
    assert json.loads(Path(plan).read_text())["tokens"] == "merge:2@1,2,3"
    code, text = command("verify", model, out, "--plan", plan, *("--data", calib[1]))
    assert code == 0 and "in place" in text, text
    code, text = command("apply", model, plan, "-o", str(tmp_path / "again.onnx"))
    assert code == 0, text
    assert (tmp_path / "again.onnx").read_bytes() == Path(out).read_bytes()
    report = tmp_path / "report.json"
    auto = ("--tokens", "auto", "--target", "macs=0.7")
    code, text = command("prune", model, "--roles", "none", *auto, *calib, "-o", out, "--json", str(report))
    assert code == 0, text
    found = json.loads(report.read_text())
    assert 0.5 < found["macs"]["after"] / found["macs"]["before"] <= 0.7
    assert found["tokens"]["steps"]
    code, text = command("prune", model, *auto, *calib, "-o", out, "--json", str(report))
    assert code == 0, text
    found = json.loads(report.read_text())
    assert 0.5 < found["macs"]["after"] / found["macs"]["before"] <= 0.7
    page = ("--report", str(tmp_path / "page.html"))
    code, text = command("prune", model, "--roles", "none", "--tokens", "topk:2@1-3", *calib, "-o", out, *page)
    assert code == 0, text
    code, text = command("inspect", model)
    assert code == 0 and "tokens: 17" in text, text


REFUSED = {
    "merge": "must look like",
    "merge:": "must look like",
    "halve:3": "no method",
    "merge:1.5": "neither a share",
    "topk:0.0": "neither a share",
    "merge:3@9": "not after block 9",
    "merge:3@1+topk:3@1": "named twice",
    "merge:3@a": "must look like",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refusals(spec: str, tmp_path: Path) -> None:
    found = analysis(Encoder(), tmp_path)
    with pytest.raises(UserError, match=REFUSED[spec]):
        reduce_tokens(found, spec)


def test_auto_needs_a_target_in_macs_and_data(tmp_path: Path) -> None:
    analysis(Encoder(), tmp_path)
    code, text = command("prune", str(tmp_path / "encoder.onnx"), "--roles", "none", "--tokens", "auto")
    assert code == 2 and "give --target macs=R and --calib" in text
