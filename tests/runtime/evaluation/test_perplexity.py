"""Perplexity: what numpy says by the definition, for causal language models only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.runtime.evaluation import LanguageHead, perplexity
from snpc.runtime.evaluation.perplexity import Surprise, find_language_head, is_causal
from snpc.types import Feeds, Perplexity
from tests.command_line import invoke, reported
from tests.models.language import Language, as_text, negative_log_likelihoods, write_language_folder
from tests.models.quantized import dynamically
from tests.oracle import analysis_of
from tests.oracle import feeds_of as export_feeds
from tests.patching import patch

SHARP = Language(sharpness=3)
IDS = SHARP.sample(24, 9)


def run(model: onnx.ModelProto | Path, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def feeds_of(ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    mask = np.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def test_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_BYTES", 24 * 8 * 5)  # five rows at a time
    head = LanguageHead("logits", "input_ids", "attention_mask")
    outputs = run(SHARP.model(), feeds_of(IDS))
    found = head.surprise(feeds_of(IDS), outputs)
    expected = negative_log_likelihoods(outputs["logits"], IDS)
    assert found.tokens == expected.size
    assert found.nats == pytest.approx(expected.sum(), rel=1e-9)
    assert found.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    """On either side; nor does the first token behind padding, which nothing predicts."""
    head = LanguageHead("logits", "input_ids", "attention_mask")
    lengths = np.array([9, 6, 4, 1])
    ids, mask = np.zeros((4, 9), np.int64), np.zeros((4, 9), np.int64)
    expected = []
    for k, length in enumerate(lengths):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[k, place], mask[k, place] = IDS[k, :length], 1
        alone = run(SHARP.model(), feeds_of(IDS[k : k + 1, :length]))
        expected.append(negative_log_likelihoods(alone["logits"], IDS[k : k + 1, :length]).sum())
    feeds = feeds_of(ids, mask)
    found = head.surprise(feeds, run(SHARP.model(), feeds))
    assert found.tokens == (lengths - 1).sum()
    assert found.nats == pytest.approx(sum(expected), rel=1e-5)


def test_other_domains_and_masks_that_begin_with_a_cache() -> None:
    logits = run(SHARP.model(), feeds_of(IDS))["logits"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    feeds = {"ids": IDS, "mask": np.ones((24, 14), np.int64)}
    for domain, values in (("logits", logits), ("probabilities", probabilities)):
        head = LanguageHead("y", "ids", "mask", domain)  # type: ignore[arg-type]
        found = head.surprise(feeds, {"y": values})
        assert found.nats == pytest.approx(negative_log_likelihoods(logits, IDS).sum(), rel=1e-9)


def test_sums() -> None:
    assert (Surprise(((1.0, 2),)) + Surprise(((3.0, 2),))).perplexity == pytest.approx(np.e)
    assert np.isnan(Surprise().perplexity)
    assert Surprise(((1e9, 1),)).perplexity == np.inf


def test_the_error_of_the_factor_is_its_spread_over_draws_of_samples() -> None:
    rng = np.random.default_rng(0)

    def draw(samples: int) -> Perplexity:
        tokens = rng.integers(20, 60, samples)
        hard = rng.normal(3.0, 0.5, samples) * tokens  # of both models
        grown = rng.normal(0.1, 0.05, samples) * tokens
        counts = tokens.tolist()
        before, after = (Surprise(tuple(zip(nats.tolist(), counts, strict=True))) for nats in (hard, hard + grown))
        return perplexity.compare_surprise(before, after)

    draws = [draw(40) for _ in range(400)]
    assert np.mean([found.error for found in draws]) == pytest.approx(np.std([f.factor for f in draws]), rel=0.15)
    assert draw(1).error == 0


def head_of(model: onnx.ModelProto, ids: np.ndarray = IDS, mask: np.ndarray | None = None) -> LanguageHead | None:
    feeds = feeds_of(ids, mask)
    given = {value.name for value in model.graph.input}
    feeds = {name: array for name, array in feeds.items() if name in given}
    return perplexity.find_language_head(
        snpc.load(model), {"input_ids": 24}, lambda fed: run(model, dict(fed)), feeds, run(model, feeds)
    )


@pytest.mark.parametrize("mask", [None, "left", "right"])
def test_a_decoder_is_known_by_its_causality(mask: str | None) -> None:
    """Also where the last tokens are padding, which changes nothing in an encoder either."""
    shown = np.ones_like(IDS)
    if mask is not None:
        shown[:, : 4 if mask == "left" else None] = mask == "right"
        shown[:, 5:] = mask == "left"
    assert head_of(SHARP.model(), mask=shown) == LanguageHead("logits", "input_ids", "attention_mask")
    assert head_of(Language(causal=False).model(), mask=shown) is None


def test_lone_tokens_show_nothing() -> None:
    assert head_of(SHARP.model(), ids=IDS[:, :1]) is None


def hidden_states(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its head: causal, but its rows are no scores of the vocabulary."""
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["B", "T", 16]))
    del model.graph.node[-1]
    return model


def last_row(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the logits of the last token alone."""
    model.graph.node[-1].output[0] = "every"
    for name, value in (("from", -1), ("to", 1 << 40), ("axis", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(onnx.helper.make_node("Slice", ["every", "from", "to", "axis"], ["logits"]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["B", 1, 24]))
    return model


@pytest.mark.parametrize("change", [hidden_states, last_row])
def test_rows_that_do_not_predict_tokens_have_no_perplexity(
    change: Callable[[onnx.ModelProto], onnx.ModelProto],
) -> None:
    assert head_of(change(SHARP.model())) is None


def exact_perplexity(path: Path, ids: np.ndarray) -> float:
    return float(np.exp(negative_log_likelihoods(run(path, feeds_of(ids))["logits"], ids).mean()))


def test_prune_verify_and_sweep_say_the_perplexity_of_their_files(tmp_path: Path) -> None:
    model, out = write_language_folder(tmp_path / "lm", SHARP), tmp_path / "cut.onnx"
    held_out = SHARP.sample(8, 9, seed=5)
    np.savez(tmp_path / "calib.npz", input_ids=IDS)
    np.savez(tmp_path / "eval.npz", input_ids=held_out)
    (tmp_path / "eval.txt").write_text(as_text(held_out))
    report = reported("prune", model, "--ratio", 0.3, "--calib", tmp_path / "calib.npz", "-o", out)
    found = report["verify"]["quality"]["perplexity"]
    apart = snpc.load_calibration(tmp_path / "calib.npz", snpc.load(model).inputs).held_out
    assert apart is not None
    ids = np.concatenate([feeds["input_ids"] for feeds in apart.batches()])
    assert found["before"] == pytest.approx(exact_perplexity(model, ids), rel=1e-5)
    assert found["after"] == pytest.approx(exact_perplexity(out, ids), rel=1e-5)
    assert found["tokens"] == 8 * len(ids)

    before, after = exact_perplexity(model, held_out), exact_perplexity(out, held_out)
    verdict = snpc.verify(model, out, calibration=snpc.load_calibration(tmp_path / "eval.npz", snpc.load(model).inputs))
    assert verdict.quality.perplexity is not None
    assert verdict.quality.perplexity.before == pytest.approx(before, rel=1e-5)
    assert verdict.quality.perplexity.after == pytest.approx(after, rel=1e-5)
    printed = invoke("verify", model, out, "--data", tmp_path / "eval.txt", "--seq-len", 9).stdout
    assert f"perplexity: {before:.4g} before, {after:.4g} after (x {after / before:.3g} +- " in printed

    words = ("--calib", tmp_path / "calib.npz", "--targets", "macs=0.9", "--iterations", 2, "-o", tmp_path / "sweep")
    for evaluation in ((), ("--eval", tmp_path / "eval.txt", "--seq-len", 9)):
        printed = invoke("sweep", model, *words, *evaluation).stdout
        points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
        assert "perplexity" in printed
        assert f"{points[0]['perplexity']:.4g}" in printed
        assert points[1]["perplexity"] not in (None, points[0]["perplexity"])
    assert points[0]["perplexity"] == pytest.approx(before, rel=1e-5)


def test_nothing_is_said_of_other_models_and_of_noise(tmp_path: Path) -> None:
    encoder = write_language_folder(tmp_path / "mlm", Language(causal=False))
    np.savez(tmp_path / "ids.npz", input_ids=IDS)
    printed = invoke("prune", encoder, "--ratio", 0.3, "--calib", tmp_path / "ids.npz", "-o", tmp_path / "a.onnx")
    assert "perplexity:" not in printed.stdout
    decoder = write_language_folder(tmp_path / "lm", SHARP)
    printed = invoke("prune", decoder, "--ratio", 0.3, "-o", tmp_path / "b.onnx")
    assert "perplexity:" not in printed.stdout


def test_the_page_has_a_card(tmp_path: Path) -> None:
    result = snpc.prune(SHARP.model(), tmp_path / "out.onnx", ratio=0.3, calibration={"input_ids": IDS})
    snpc.write_report(result, tmp_path / "report.html")
    assert isinstance(result.quality.perplexity, Perplexity)
    assert f"from {result.quality.perplexity.before:.4g}, now x" in (tmp_path / "report.html").read_text()


def test_samples_whose_outputs_are_not_kept_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits over a large vocabulary take too much memory for the comparison of all samples."""
    calibration = snpc.load_calibration({"input_ids": SHARP.sample(60, 9)}, snpc.load(SHARP.model()).inputs, samples=20)
    assert calibration.held_out is not None
    every = snpc.prune(SHARP.model(), ratio=0.3, calibration=calibration)
    patch(monkeypatch, "snpc.pipeline.verify.MAX_OUTPUT_BYTES", 1)
    few = snpc.prune(SHARP.model(), ratio=0.3, calibration=calibration)
    assert (every.quality.samples, few.quality.samples) == (calibration.held_out.samples, 16)
    assert every.quality.perplexity is not None
    assert every.quality.perplexity.tokens == 8 * calibration.held_out.samples
    assert few.quality.perplexity == every.quality.perplexity


def test_a_decoder_with_caches_needs_no_trial(tmp_path: Path) -> None:
    """Scales of dynamic int8 depend on all tokens, so its earlier logits move with the last token a little."""
    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(Language(cached=True, sharpness=3).model(), source)
    dynamically(source, path, {})
    empty = {f"past_key_values.0.{part}": np.zeros((24, 2, 0, 8), np.float32) for part in ("key", "value")}
    feeds = feeds_of(IDS) | empty
    outputs = run(path, feeds)

    def changed(other: Feeds) -> dict[str, Any]:
        return run(path, dict(other))

    assert find_language_head(snpc.load(path), {}, changed, feeds, outputs) is not None
    assert not is_causal(LanguageHead("logits", "input_ids", "attention_mask"), changed, feeds, outputs)


def test_of_an_encoder_and_decoder_the_decoder_predicts(tmp_path: Path) -> None:
    """Its own ids, not those that the encoder reads; all of them where it takes no mask."""
    model = analysis_of("bart__ts17").model
    feeds = export_feeds("bart__ts17")
    outputs = run(model.path, feeds)
    head = find_language_head(model, {}, lambda changed: run(model.path, dict(changed)), feeds, outputs)
    assert head == LanguageHead("logits", "decoder_input_ids", None)
    expected = negative_log_likelihoods(outputs["logits"], feeds["decoder_input_ids"])
    found = head.surprise(feeds, outputs)
    assert (found.tokens, found.nats) == (expected.size, pytest.approx(expected.sum(), rel=1e-5))
