"""Files beside their original: what a page says of files that were written at any time before."""

from __future__ import annotations

import html
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import snpc
from snpc.planning import write_provenance
from snpc.report.comparison import FileComparison
from snpc.runtime.io import save
from tests.command_line import CALIB, invoke
from tests.models.builder_decoders import BuilderDecoder

DATA = Path(snpc.__file__).parent / "data" / "digits"
MODEL = DATA / "digits_vit.onnx"


@dataclass(frozen=True)
class Files:
    """``half``: pruned. ``unnamed``: the same without provenance. ``tuned``: with other weights. ``built``: an .ort."""

    half: Path
    unnamed: Path
    tuned: Path
    built: Path
    result: snpc.PrunedModel


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    half, unnamed, tuned, built = (folder / name for name in ("half.onnx", "unnamed.onnx", "tuned.onnx", "half.ort"))
    data = snpc.load_calibration(str(DATA / "calib.npz"), snpc.load(MODEL).inputs, samples=16)
    result = snpc.prune(MODEL, half, calibration=data, ratio=0.5, tokens="merge:2@1", method="parallel")
    proto = onnx.load(half)
    for tensor in proto.graph.initializer:
        if tensor.name == "head.weight" or tensor.name.endswith("fc2.bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    onnx.save(proto, tuned)
    proto = onnx.load(half)
    del proto.metadata_props[:]
    onnx.save(proto, unnamed)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(built)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(half), options, providers=["CPUExecutionProvider"])
    return Files(half, unnamed, tuned, built, result)


@pytest.fixture(scope="module")
def comparison(files: Files) -> FileComparison:
    inputs = snpc.load(MODEL).inputs
    labels = np.load(DATA / "eval.npz")["labels"]
    data = snpc.load_calibration(str(DATA / "eval.npz"), inputs, samples=len(labels), held_out=0)
    return snpc.compare_files(
        MODEL,
        [files.half, str(files.unnamed), files.tuned, files.built],
        calibration=str(DATA / "calib.npz"),
        evaluation=snpc.EvaluationData(data, labels),
    )


def test_widths_are_those_of_the_plan_with_and_without_provenance(comparison: FileComparison, files: Files) -> None:
    plan = files.result.plan
    expected = {group.id: plan.kept_width(group) for group in plan.analysis.groups}
    half, unnamed, tuned, built = comparison.files
    assert half.kept == tuned.kept == built.kept == expected
    assert unnamed.kept.items() <= expected.items()
    assert {g.role for g in plan.analysis.groups if g.id in unnamed.kept} >= {"ffn"}
    assert built.cost is None and built.macs is None
    assert half.macs == files.result.after.macs and half.cost is not None
    assert half.cost.params == files.result.after.params
    assert built.bytes == files.built.stat().st_size


def test_quality_and_score_are_those_of_the_outputs(comparison: FileComparison, files: Files) -> None:
    """By onnxruntime and numpy alone."""
    held_out = comparison.calibration and comparison.calibration.held_out
    assert held_out is not None
    image = np.concatenate([feeds["image"] for feeds in held_out.batches()])
    evaluation = np.load(DATA / "eval.npz")

    def logits(path: Path, images: np.ndarray) -> np.ndarray:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"image": images[k : k + 4]})[0] for k in range(0, len(images), 4)])

    dense = logits(MODEL, image).astype(np.float64)
    for file in comparison.files:
        own = logits(file.path, image)
        assert file.quality.differences[0].relative == pytest.approx(
            np.linalg.norm(own - dense) / np.linalg.norm(dense), rel=0.05
        )
        right = (logits(file.path, evaluation["image"]).argmax(1) == evaluation["labels"]).mean()
        assert file.task is not None and file.task.after == pytest.approx(right)
    half, _, tuned, _ = comparison.files
    assert tuned.quality.drift > 2 * half.quality.drift


def test_the_page_shows_all_files(comparison: FileComparison, files: Files, tmp_path: Path) -> None:
    timed = snpc.bench([MODEL, *(f.path for f in comparison.files)], protocol=snpc.TimingProtocol(1, 3))
    report = snpc.write_report(comparison, tmp_path / "page.html", bench=timed)
    text = (tmp_path / "page.html").read_text()
    for file, speedup in zip(report.files, timed.speedups, strict=True):
        assert text.count(f"{file.name}</span>") >= 3  # keys of the charts
        assert f"{speedup.ratio:.2f} x ({speedup.low:.2f} to {speedup.high:.2f})" in text
        assert f"{100 * (file.task.after if file.task else 0):.4g} %" in text
    assert "half.ort is no ONNX file" in text and "unnamed.onnx: " not in " ".join(report.warnings[:1])
    assert report.token_maps.pictures and report.attention.pictures  # of half.onnx, which says its tokens
    assert report.token_maps.tokens == 17
    half = report.files[0].reproduction
    assert half is not None and ("sha256 of digits_vit.onnx", comparison.analysis.model.digest) in half.facts
    assert "--ratio 0.5" in half.command and "--tokens merge:2@1" in half.command and "ratio=0.5" in half.call
    assert report.files[1].reproduction is None and "does not say how it was made" in report.files[1].made
    assert snpc.write_report(comparison, tmp_path / "charts.svg", bench=timed) == report
    shown = {text.text for text in ElementTree.parse(tmp_path / "charts.svg").iter() if text.tag.endswith("}text")}
    assert {
        "query and key",
        "feed-forward, hidden",
        "latency",
        "MACs by role",
        *(f.name for f in report.files),
    } <= shown
    with pytest.raises(snpc.UserError, match="has its own data"):
        snpc.write_report(comparison, tmp_path / "other.html", command="snpc prune")
    json.dumps(report.to_json(), default=str)


def test_the_page_says_every_step_and_how_to_make_it_again(files: Files, tmp_path: Path) -> None:
    tuned, built = tmp_path / "tuned.onnx", tmp_path / "fast.onnx"
    proto, source = snpc.load(files.half).graph, snpc.load(files.half)
    digest = snpc.load(MODEL).digest
    options = json.dumps({"steps": 48, "loss": "kd+ce", "layerwise": True, "outputs": ["a", "b"]})
    entries = {"step": "finetune", "steps": "48", "options": options, "loss": "kd+ce", "teacher_sha256": digest}
    write_provenance(proto, source, entries)
    save(proto, tuned)
    snpc.build(tuned, "ort", built)
    comparison = snpc.compare_files(MODEL, [built])
    assert comparison.files[0].kept == {g.id: files.result.plan.kept_width(g) for g in comparison.analysis.groups}
    (file,) = snpc.write_report(comparison, tmp_path / "page.html").files
    assert file.made == (
        "pruned by 50 % of the units and to fewer tokens (merge:2@1), then finetuned for 48 steps, then built for "
        "onnxruntime in fp32"
    )
    text = (tmp_path / "page.html").read_text()
    assert all(html.escape(step) in text for step in file.steps) and len(file.steps) == 3
    assert ">weights</th>" not in text, "a file does not say which of its weights were refitted"
    assert file.reproduction is not None and file.reproduction.call == ""
    prune, finetune, build = file.reproduction.command.splitlines()
    assert prune.startswith(f"snpc prune {MODEL} --ratio 0.5") and prune.endswith("-o half.onnx")
    assert finetune == (
        f"snpc finetune half.onnx --teacher {MODEL} --data DATA --steps 48 --loss kd+ce --layerwise --output-name a "
        "--output-name b --labels LABELS -o tuned.onnx"
    )
    assert build == f"snpc build tuned.onnx --target ort --precision fp32 -o {built}"


WIDTHS = {"ratio": 0.5, "roles": ("ffn",), "uniform": True, "round_to": 8, "method": "select", "criterion": "magnitude"}
TOKENS = {"tokens": "merge:2@2-3"}


@pytest.mark.parametrize(
    ("options", "has_data"), [(WIDTHS, False), (TOKENS, False), (TOKENS, True), ({**TOKENS, "method": "select"}, True)]
)
def test_the_page_says_how_to_make_the_same_file(options: dict[str, Any], has_data: bool, tmp_path: Path) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    result = snpc.prune(MODEL, first, calibration=CALIB if has_data else None, **options)
    made = snpc.write_report(result, tmp_path / "page.html").files[0].reproduction
    assert made is not None
    exec(made.call.replace(repr(str(first)), repr(str(again))), {})
    assert again.read_bytes() == first.read_bytes()
    again.unlink()
    invoke(*shlex.split(made.command.replace(str(first), str(again)))[1:])
    assert again.read_bytes() == first.read_bytes()


def test_a_decoder_with_narrower_caches_is_compared_on_empty_ones(tmp_path: Path) -> None:
    path, half = BuilderDecoder().write(tmp_path / "decoder.onnx"), tmp_path / "half.onnx"
    snpc.prune(path, half, ratio=0.5, method="select", criterion="magnitude", prune_kv_cache=True)
    ids = np.random.default_rng(0).integers(0, 20, (8, 12))
    data = snpc.load_calibration({"input_ids": ids}, snpc.load(path).inputs, samples=8, held_out=0)
    (file,) = snpc.compare_files(path, [half], calibration=data).files
    change = norm = 0.0
    for feeds in data.batches():
        narrow = {name: array[..., :16] if "past" in name else array for name, array in feeds.items()}
        (dense,), (own,) = (
            ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(["logits"], f)
            for p, f in ((path, feeds), (half, narrow))
        )
        change, norm = change + np.square(own - dense).sum(), norm + np.square(dense).sum()
    (difference,) = file.quality.differences
    assert difference.output == "logits" and difference.relative == pytest.approx((change / norm) ** 0.5, rel=0.01)
    with pytest.raises(snpc.UserError, match="its caches are narrower"):
        snpc.compare_files(path, [half])


@pytest.mark.parametrize(
    ("names", "complaint"),
    [([], "at least one file"), (["half.onnx"] * 7, "at most 6"), (["half.plan"], "engines are not run")],
)
def test_what_cannot_be_compared_is_refused(names: list[str], complaint: str, files: Files) -> None:
    with pytest.raises(snpc.UserError, match=complaint):
        snpc.compare_files(MODEL, [files.half.with_name(name) for name in names])
