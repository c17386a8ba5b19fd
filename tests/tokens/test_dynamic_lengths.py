"""Tokens of which there is no fixed number: inputs of any length with padding, and as many as each input needs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, file_decisions, self_deciding_model
from snpc.pipeline.token_request import apply_token_request, measure_offline_scores
from snpc.runtime.io.save import save
from snpc.tokens.reduction import reduce_tokens
from tests.models.classifiers import CLASSIFIERS, SENTENCES
from tests.models.encoders import Array, Encoder, forward
from tests.models.exports import VOCABULARY, export
from tests.oracle import analysis_of, feeds_of, run

DYNAMIC = [name for name in CLASSIFIERS if not CLASSIFIERS[name].static_batch]
LENGTHS = [(11, 8, 3), (6,), (9, 9, 2, 1)]


def texts(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Array]:
    """Ids of samples that are so long, padded on the right to the longest."""
    rng = np.random.default_rng(seed)
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(real, rng.integers(2, VOCABULARY, real.shape), 0)
    return {"input_ids": ids.astype(np.int64), "attention_mask": real.astype(np.int64)}


def written(reduced: Analysis, folder: Path) -> Path:
    path = folder / "reduced.onnx"
    save(finalize(self_deciding_model(reduced)), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_text_classifiers_of_any_length(name: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    assert [(p.block, p.leading, p.fixed_length) for p in found.tokens.points] == [
        (k, 1, name not in DYNAMIC) for k in (1, 2)
    ]
    reduced = reduce_tokens(found, "topk:0.5@1+topk:0.6@2")
    path = written(reduced, tmp_path)
    batches = [texts(lengths) for lengths in LENGTHS] if name in DYNAMIC else [feeds_of(name)]
    assert reduced.reduction is not None
    _, said = check_token_reduction(reduced, path, batches, 1e-5)
    assert "in place" in said
    for feeds in batches:
        assert np.abs(run(path, feeds)[0] - run(export(name), feeds)[0]).max() > 1e-3, "nothing was reduced"
        assert np.abs(run(path, feeds)[0] - run(path, feeds, "all")[0]).max() < 1e-4


@pytest.mark.parametrize("name", [n for n in DYNAMIC if "23" not in n])
def test_what_stays_is_what_the_class_token_attends_to_most_and_no_padding(name: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    reduced = reduce_tokens(found, "topk:0.5@1")
    path = written(reduced, tmp_path)
    shown = found.model.graph.clone()
    scores = found.tokens.points[0].scores
    assert scores is not None
    shown.graph.outputs.extend(v for node in shown.graph for v in node.outputs if v.name == scores.tensor)
    save(shown, tmp_path / "shown.onnx")
    for lengths in LENGTHS:
        feeds = texts(lengths)
        (decided,) = file_decisions(path, ["tokens_1_keep"], [feeds])
        keep = decided["tokens_1_keep"]
        count = math.ceil(0.5 * (max(lengths) - 1))
        assert keep.shape == (len(lengths), count)
        weights = run(tmp_path / "shown.onnx", feeds)[1].reshape(len(lengths), scores.heads, max(lengths), -1)
        for row, length, share in zip(keep, lengths, weights[:, :, 0].sum(1), strict=True):
            real = min(count, length - 1)
            best = 1 + np.argsort(-share[1:length])[:count]
            assert set(row[:real]) == set(best[:real])
            assert (row[:real] < length).all()  # padding only where there is nothing else


@pytest.mark.slow
def test_padded_tokens_do_not_matter(tmp_path: Path) -> None:
    """What ids stand where there is padding changes nothing."""
    path = written(reduce_tokens(analysis_of("bert_class__dyn20_sdpa"), "topk:0.5"), tmp_path)
    feeds = texts((11, 8, 3))
    other = {**feeds, "input_ids": np.where(feeds["attention_mask"] > 0, feeds["input_ids"], 7)}
    assert np.abs(run(path, feeds)[0] - run(path, other)[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, "topk:0.5@1+topk:0.6@2") for name in SENTENCES),
        *((name, "adaptive:0.8@1") for name in SENTENCES if name.endswith(("ts17_static", "dyn20_sdpa"))),
    ],
)
def test_means_that_leave_padding_out(name: str, spec: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    fixed = SENTENCES[name].static_batch is not None
    assert [(p.block, p.leading, p.fixed_length) for p in found.tokens.points] == [(k, 0, fixed) for k in (1, 2, 3)]
    batches = [feeds_of(name)] if fixed else [texts(lengths) for lengths in LENGTHS]
    data = snpc.load_calibration(batches[0], found.model.inputs, batch=2)
    reduced = reduce_tokens(found, spec, measure_offline_scores(found, data, spec))
    path = written(reduced, tmp_path)
    _, said = check_token_reduction(reduced, path, batches, 1e-5)
    assert "in place" in said
    for feeds in batches:
        assert np.abs(run(path, feeds)[0] - run(export(name), feeds)[0]).max() > 1e-3, "nothing was reduced"
        alone = {k: v[-1:, : feeds["attention_mask"][-1].sum()] for k, v in feeds.items()}
        if spec.startswith("adaptive") and not fixed:  # padding is neither kept nor counted
            assert np.abs(run(path, feeds)[0][-1:] - run(path, alone)[0]).max() < 1e-4


def test_encoders_that_a_decoder_reads(tmp_path: Path) -> None:
    reduced = reduce_tokens(analysis_of("bart__ts17"), "topk:0.5")
    check_token_reduction(reduced, written(reduced, tmp_path), [feeds_of("bart__ts17")], 1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [("merge:2", "use topk"), ("topk:2", "give topk and a share"), ("fuse:0.5@1", "use topk")],
)
def test_numbers_need_inputs_of_one_length(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reduce_tokens(analysis_of("bert_class__ts17"), spec)


@pytest.mark.slow
def test_the_command_line_with_widths(tmp_path: Path) -> None:
    name = "bert_class__dyn20_sdpa"
    model, out, plan = str(export(name)), str(tmp_path / "out.onnx"), str(tmp_path / "plan.json")
    parts = [texts((11, 9, 4, 11), seed) for seed in range(6)]
    np.savez(tmp_path / "calib.npz", **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
    calib = ("--calib", str(tmp_path / "calib.npz"))
    wanted = ("--tokens", "topk:0.5@1,2", "--ratio", "0.25")
    result = CliRunner().invoke(main, ["prune", model, *wanted, *calib, "-o", out, "--plan", plan])
    assert result.exit_code == 0, result.output
    assert json.loads(Path(plan).read_text())["tokens"] == "topk:0.5@1,2"
    result = CliRunner().invoke(main, ["verify", model, out, "--plan", plan, "--data", calib[1]])
    assert result.exit_code == 0 and "in place" in result.output, result.output
    for lengths in LENGTHS:
        assert run(Path(out), texts(lengths))[0].shape == (len(lengths), 5)


@pytest.mark.parametrize("name", ["bert_class__dyn20_sdpa", "bert_mean__ts17"])
def test_schedules_for_inputs_of_any_length_are_shares(name: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    parts = [texts((12, 9, 4, 12), seed) for seed in range(4)]
    arrays = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    data = snpc.load_calibration(arrays, found.model.inputs, batch=4)
    reduced = apply_token_request(found, data, "auto", target=snpc.parse_target("macs=0.7"))
    assert reduced.reduction is not None and set(reduced.reduction.spec) >= set("topk:0.@")
    result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
    assert 0.67 < result.after.macs / found.cost.macs <= 0.7
    by_hand = reduce_tokens(found, reduced.reduction.spec)
    assert by_hand.cost.macs == reduced.cost.macs
    check_token_reduction(reduced, written(reduced, tmp_path), [texts(lengths) for lengths in LENGTHS], 1e-5)


@pytest.mark.parametrize("name", ["bert_class__ts17", "bert_class__dyn23_sdpa"])
def test_macs_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    reduced = reduce_tokens(analysis_of(name), "topk:0.5")
    result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
    assert result.after.macs == reduced.cost.macs - reduced.dead_macs < 0.75 * reduced.cost.macs
    assert result.after.macs == snpc.analyze(snpc.load(result.path)).cost.macs


# -- as many as each input needs -------------------------------------------------------------------------------------

FORMS = {
    "plain": Encoder(),
    "pooled": Encoder(exit="mean"),
    "literal sizes": Encoder(literal=True),
    "batch and heads in one axis": Encoder(merged=True, literal=True),
    "fused": Encoder(fused=True, opset=23),
    "fused and pooled": Encoder(fused=True, opset=23, exit="mean"),
}


def adaptive(encoder: Encoder, spec: str, folder: Path) -> Analysis:
    onnx.save(encoder.model(), folder / "encoder.onnx")
    found = snpc.analyze(snpc.load(folder / "encoder.onnx"))
    data = snpc.load_calibration({"x": encoder.feeds(16)["x"]}, found.model.inputs, batch=5)
    return reduce_tokens(found, spec, measure_offline_scores(found, data, spec))


@pytest.mark.parametrize("form", FORMS)
def test_each_sample_keeps_what_numpy_keeps(form: str, tmp_path: Path) -> None:
    encoder = FORMS[form]
    shares = {1: 0.8, 3: 0.7}
    spec = "+".join(f"adaptive:{share}@{block}" for block, share in shares.items())
    reduced = adaptive(encoder, spec, tmp_path)
    path = written(reduced, tmp_path)
    batches = [encoder.feeds(5, seed) for seed in (1, 2)]
    check_token_reduction(reduced, path, batches, 1e-5)
    for feeds in batches:
        (together,) = run(path, feeds)
        for k in range(5):
            x = feeds["x"][k : k + 1]
            expected = forward(encoder, x, {}, shares=shares)
            assert np.abs(run(path, {"x": x})[0] - expected).max() < 1e-4
            assert np.abs(together[k] - expected[0]).max() < 1e-4  # what the others keep does not matter
            assert np.abs(forward(encoder, x, {}) - expected).max() > 1e-3


def test_easy_inputs_keep_fewer(tmp_path: Path) -> None:
    encoder = Encoder(patches=24)
    reduced = adaptive(encoder, "adaptive:0.7@2", tmp_path)
    path = written(reduced, tmp_path)
    model = ir.load(path)
    scores = reduced.tokens.points[1].scores
    assert scores is not None
    model.graph.outputs.extend(v for n in model.graph for v in n.outputs if v.name in (scores.tensor, "tokens_2_alive"))
    save(model, tmp_path / "shown.onnx")
    feeds = encoder.feeds(40)
    session = {v.name: k for k, v in enumerate(model.graph.outputs)}
    outputs = run(tmp_path / "shown.onnx", feeds)
    alive, weights = outputs[session["tokens_2_alive"]], outputs[session[scores.tensor]]
    kept = alive.sum(1)
    share = weights[:, :, 0].sum(1)[:, 1:]
    largest = share.max(1) / share.sum(1)
    few, many = kept <= np.quantile(kept, 0.2), kept >= np.quantile(kept, 0.8)
    assert kept.min() < kept.max() == alive.shape[1] < 24
    assert largest[few].mean() > 1.2 * largest[many].mean()
    for k in (int(kept.argmin()), int(kept.argmax())):  # alone, a sample keeps its own number
        (alone,) = file_decisions(path, ["tokens_2_keep"], [{"x": feeds["x"][k : k + 1]}])
        assert alone["tokens_2_keep"].shape == (1, kept[k])


@pytest.mark.parametrize("name", ["bert_class__ts17_sdpa", "bert_class__dyn20", "bert_class__dyn23_sdpa"])
def test_texts_of_any_length_keep_what_they_need(name: str, tmp_path: Path) -> None:
    found = analysis_of(name)
    spec = "adaptive:0.8@1,2"
    data = snpc.load_calibration(texts((11, 9, 4, 11)), found.model.inputs, batch=2)
    reduced = reduce_tokens(found, spec, measure_offline_scores(found, data, spec))
    path = written(reduced, tmp_path)
    check_token_reduction(reduced, path, [texts(lengths) for lengths in LENGTHS], 1e-5)
    feeds = texts((11, 8, 3))
    (together,) = run(path, feeds)
    for k, length in enumerate((11, 8, 3)):  # neither the others nor the padding matter
        alone = {name: array[k : k + 1, :length] for name, array in feeds.items()}
        assert np.abs(run(path, alone)[0][0] - together[k]).max() < 1e-5


@pytest.mark.parametrize("share", ["1.0", "0.9999999"])
def test_the_whole_share_keeps_all(share: str, tmp_path: Path) -> None:
    encoder = Encoder()
    reduced = adaptive(encoder, f"adaptive:{share}", tmp_path)
    feeds = encoder.feeds()
    dense = snpc.apply(
        snpc.PruningPlan(snpc.SlicePlan(snpc.analyze(reduced.model), "none", {}, {})), tmp_path / "dense.onnx"
    ).path
    fewer = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx").path
    gap = np.abs(run(fewer, feeds)[0] - run(dense, feeds)[0]).max()
    assert gap == 0 if share == "1.0" else gap < 1e-5


def test_macs_are_those_of_the_mean(tmp_path: Path) -> None:
    encoder = Encoder()
    reduced = adaptive(encoder, "adaptive:0.8@2", tmp_path)
    assert reduced.reduction is not None
    (step,) = reduced.reduction.to_json()["steps"]
    assert step["on_average"] and 1 < step["after"] < 13
    result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx"))
    fixed = reduce_tokens(found, f"topk:{13 - step['after']}@2")
    assert result.after.macs == fixed.cost.macs - fixed.dead_macs
    (decided,) = file_decisions(result.path, ["tokens_2_alive"], [{"x": encoder.feeds(16)["x"]}])
    assert step["after"] == 1 + round(float(decided["tokens_2_alive"].sum(1).mean()))


def test_adaptive_with_widths_by_the_command_line(tmp_path: Path) -> None:
    encoder = Encoder(width=32)
    onnx.save(encoder.model(), tmp_path / "encoder.onnx")
    np.savez(tmp_path / "calib.npz", x=encoder.feeds(24)["x"])
    model, out, plan = (str(tmp_path / n) for n in ("encoder.onnx", "out.onnx", "plan.json"))
    calib = ("--calib", str(tmp_path / "calib.npz"))
    tokens = ("--tokens", "adaptive:0.8@1,3")
    result = CliRunner().invoke(
        main, ["prune", model, *tokens, "--target", "macs=0.6", *calib, "-o", out, "--plan", plan]
    )
    assert result.exit_code == 0 and "on average" in result.output, result.output
    result = CliRunner().invoke(main, ["verify", model, out, "--plan", plan, "--data", calib[1]])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["apply", model, plan, *calib, "-o", str(tmp_path / "again.onnx")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.onnx").read_bytes() == Path(out).read_bytes()
    result = CliRunner().invoke(main, ["prune", model, "--roles", "none", *tokens, "-o", out])
    assert result.exit_code == 2 and "give --calib" in result.stderr


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("adaptive:3", "takes a share of the scores"),
        ("adaptive:0.8@1+topk:0.5@2", "put topk before it"),
        ("adaptive:0.8@1+merge:2@2", "put merge before it"),
    ],
)
def test_what_adaptive_refuses(spec: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        adaptive(Encoder(), spec, tmp_path)


def test_a_batch_without_a_name(tmp_path: Path) -> None:
    encoder = Encoder()
    model = encoder.model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
    onnx.save(model, tmp_path / "encoder.onnx")
    found = snpc.analyze(snpc.load(tmp_path / "encoder.onnx"))
    for spec in ("topk:3@1", "adaptive:0.8@1"):
        reduced = reduce_tokens(found, spec, {1: (0.75,)})
        result = snpc.apply(snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {})), tmp_path / "out.onnx")
        assert result.after.macs == reduced.cost.macs - reduced.dead_macs < 0.9 * reduced.cost.macs
        check_token_reduction(reduced, result.path, [encoder.feeds(4)], 1e-5)
