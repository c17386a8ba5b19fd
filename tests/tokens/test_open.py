"""Tokens of dense outputs: merged inside a span, and all back at its exit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import snpc
from snpc.errors import UserError
from snpc.graph import choose_dim_sizes
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, file_decisions, self_deciding_model
from snpc.pipeline.token_schedule import prepare_evaluator
from snpc.runtime.execution import DEFAULT_EXECUTION
from snpc.runtime.io.save import save
from snpc.tokens import TOKEN_METHODS
from snpc.tokens.cost import token_cost
from snpc.tokens.inplace_oracle import token_membership
from snpc.tokens.reduction import TokenReductionPlan, exit_blocks, parse_token_request, reduce_tokens, settings_for
from tests.command_line import invoke
from tests.models.encoders import Array, Encoder, norm

DENSE = Encoder(exit="all")
FORMS = {
    "plain": DENSE,
    "fp16": replace(DENSE, half=True),
    "fused": replace(DENSE, fused=True, opset=23),
    "batch and heads in one axis": replace(DENSE, merged=True, literal=True),
    "the stream itself is returned": DENSE,
}
SPECS = (
    "merge:2",
    "merge:2@1-3/4:copy",
    "guided:3@1-2/3",
    "energy:3@1/2+energy:2@3-4/4:copy",
    "merge:5@2/2",  # one feed-forward layer
)


def analysis(model: onnx.ModelProto, folder: Path) -> Analysis:
    path = folder / "encoder.onnx"
    onnx.save(model, path)
    return snpc.analyze(snpc.load(path))


def model_of(form: str) -> onnx.ModelProto:
    model = FORMS[form].model()
    if form == "the stream itself is returned":
        head = model.graph.node.pop()
        next(n for n in model.graph.node if n.output[0] == head.input[0]).output[0] = "y"
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = DENSE.width
    return model


def written(reduced: Analysis, folder: Path) -> Path:
    save(finalize(self_deciding_model(reduced)), folder / "fewer.onnx")
    return folder / "fewer.onnx"


def outputs(path: Path | str, encoder: Encoder) -> Array:
    found: Array = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, encoder.feeds())[0]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_merging_and_giving_back_is_the_same_in_place(form: str, tmp_path: Path) -> None:
    found = analysis(model_of(form), tmp_path)
    assert [[e.block for e in p.exits] for p in found.tokens.points] == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]
    whole = outputs(found.model.path, FORMS[form])
    cost = token_cost(found, choose_dim_sizes(found.model.graph)[1])
    for spec in SPECS:
        reduced = reduce_tokens(found, spec)
        path = written(reduced, tmp_path)
        check_token_reduction(reduced, path, [FORMS[form].feeds()], 2e-2 if FORMS[form].half else 1e-5)
        assert outputs(path, FORMS[form]).shape == whole.shape
        request = parse_token_request(found, spec)
        settings = settings_for(found.tokens.points, request, count=cost.count)
        macs = cost.macs(settings, TOKEN_METHODS[spec.partition(":")[0]], exit_blocks(request))
        assert macs == reduced.cost.macs - reduced.dead_macs < found.cost.macs
        assert reduced.reduction is not None
        assert reduce_tokens(found, reduced.reduction.spec).reduction == reduced.reduction


@pytest.mark.parametrize("unmerge", ["delta", "copy"])
@pytest.mark.parametrize("method", ["merge", "energy"])
def test_the_written_graph_is_what_numpy_makes_of_it(method: str, unmerge: str, tmp_path: Path) -> None:
    found = analysis(DENSE.model(), tmp_path)
    reduced = reduce_tokens(found, f"{method}:3@1,2/3:{unmerge}")
    path = written(reduced, tmp_path)
    plan = reduced.reduction
    assert isinstance(plan, TokenReductionPlan)
    (decided,) = file_decisions(path, plan.decisions, [DENSE.feeds()])
    members = list(token_membership(plan.steps, decided, DENSE.tokens))
    assert [m.shape[1] for m in members] == [9, 6]
    expected = merged_forward(DENSE, DENSE.feeds()["x"], dict(zip((1, 2), members, strict=True)), 3, unmerge)
    assert np.abs(outputs(path, DENSE) - expected).max() < 1e-4 * np.abs(expected).max()


def merged_forward(encoder: Encoder, x: Array, members: dict[int, Array], back: int, form: str) -> Array:
    """The outputs in float64: behind the attention of each block in ``members``, [B, tokens left, tokens at first],
    tokens are replaced by the mean of what they are made of; behind block ``back`` all return."""
    w = {name: a.astype(np.float64) for name, a in encoder.weights().items()}
    values = x.astype(np.float64) + w["positions"]
    details, count = np.zeros_like(values), np.ones(values.shape[:2])
    holds = np.broadcast_to(np.eye(encoder.tokens), (len(x), encoder.tokens, encoder.tokens))
    for k in range(encoder.depth):
        values = values + attention(encoder, w, norm(values, w, f"{k}a"), k, count)
        if k + 1 in members:
            spread = holds.transpose(0, 2, 1) @ values
            holds = members[k + 1]
            count = holds.sum(2)
            values = holds @ spread / count[..., None]
            details = details + spread - holds.transpose(0, 2, 1) @ values
        values = values + np.maximum(norm(values, w, f"{k}b") @ w[f"up{k}"], 0) @ w[f"down{k}"]
        if k + 1 == back:
            values = holds.transpose(0, 2, 1) @ values + (details if form == "delta" else 0)
            count = np.ones(values.shape[:2])
    out: Array = values @ w["head"]
    return out


def attention(encoder: Encoder, w: dict[str, Array], x: Array, k: int, count: Array) -> Array:
    """Every key counts for as many tokens as it is made of."""
    shape = (*x.shape[:2], encoder.heads, -1)
    q, key, v = ((x @ w[f"{name}{k}"]).reshape(shape).transpose(0, 2, 1, 3) for name in "qkv")
    weights = np.exp(q @ key.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])) * count[:, None, None]
    context = (weights / weights.sum(-1, keepdims=True)) @ v
    out: Array = context.transpose(0, 2, 1, 3).reshape(x.shape) @ w[f"o{k}"]
    return out


@pytest.mark.parametrize("unmerge", ["delta", "copy"])
def test_equal_tokens_lose_nothing_and_no_tokens_change_no_bit(unmerge: str, tmp_path: Path) -> None:
    found = analysis(DENSE.model(), tmp_path)
    positions = DENSE.weights()["positions"][0]
    x = DENSE.feeds()["x"]
    x[:, 1::2] = x[:, ::2] + positions[::2] - positions[1::2]
    sessions = {
        spec: ort.InferenceSession(str(written(reduce_tokens(found, f"{spec}@1/4:{unmerge}"), tmp_path)))
        for spec in ("merge:0", "merge:6")
    }
    whole = ort.InferenceSession(str(found.model.path)).run(None, {"x": x})[0]
    assert np.array_equal(sessions["merge:0"].run(None, {"x": x})[0], whole)
    assert np.abs(sessions["merge:6"].run(None, {"x": x})[0] - whole).max() < 2e-6 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topk:0.7@2", "cannot give them back; use merge or guided or energy"),
        ("merge:2@3/2", "can be back behind blocks 3 to 4, not 2"),
        ("merge:2@1/3+merge:2@2/4", "give /3 there too"),
        ("merge:2@1/3:mean", "must look like"),
    ],
)
def test_refusals(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        reduce_tokens(analysis(DENSE.model(), tmp_path), spec)


def test_a_classifier_needs_no_token_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out /3"):
        reduce_tokens(analysis(Encoder().model(), tmp_path), "merge:2@1/3")


def test_the_numbers_of_tokens_are_told(tmp_path: Path) -> None:
    reduced = reduce_tokens(analysis(DENSE.model(), tmp_path), "merge:2@1-2/3+merge:3@4:copy")
    assert reduced.reduction is not None
    spec = "merge:2@1,2/3+merge:3@4/4:copy"
    assert reduced.reduction.summary == f"12 to 8 by {spec}, all back behind blocks 3, 4"
    assert [(s["after"], s["back_behind"], s["form"]) for s in reduced.reduction.to_json()["steps"]] == [
        (10, 3, "delta"),
        (8, 3, "delta"),
        (9, 4, "copy"),
    ]
    assert isinstance(reduced.traced_graph.model, ir.Model)


def test_relevance_is_measured_only_where_tokens_can_be_dropped(tmp_path: Path) -> None:
    """No method that reads it can bring tokens back."""
    for encoder, known in ((replace(DENSE, depth=2), False), (Encoder(depth=2), True)):
        found = analysis(encoder.model(), tmp_path)
        data = snpc.load_calibration({"x": encoder.feeds(2)["x"]}, found.model.inputs, batch=2)
        assert bool(prepare_evaluator(found, data, DEFAULT_EXECUTION).offline) == known


def test_the_command_line_chooses_spans(tmp_path: Path) -> None:
    model, out, report = (str(tmp_path / name) for name in ("encoder.onnx", "out.onnx", "report.json"))
    analysis(Encoder(exit="all", depth=2, patches=16).model(), tmp_path)
    np.savez(tmp_path / "calib.npz", x=Encoder(patches=16).feeds(12)["x"])
    data = ("--calib", str(tmp_path / "calib.npz"))
    plan, page = str(tmp_path / "plan.json"), str(tmp_path / "page.html")
    written_too = ("--plan", plan, "--json", report, "--report", page)
    text = invoke("prune", model, "--roles", "none", "--target", "macs=0.8", *data, "-o", out, *written_too).output
    assert "all back behind block" in text and "taken out in place" in text
    steps = json.loads(Path(report).read_text())["tokens"]["steps"]
    assert all(step["back_behind"] >= step["block"] for step in steps)
    invoke("apply", model, plan, *data, "-o", str(tmp_path / "again.onnx"))
    assert onnx.load(tmp_path / "again.onnx").graph == onnx.load(out).graph
    assert "can be merged after blocks 1 to 2 of 2, and are back by block 2" in invoke("inspect", model).output
    assert json.loads(Path(plan).read_text())["tokens"] in Path(page).read_text()
