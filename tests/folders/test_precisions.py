"""Folders as transformers.js and optimum load them: models in ``onnx``, each at several precisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.planning import read_provenance
from snpc.targets import write_precisions
from tests.command_line import invoke, reported
from tests.models.decoder_pairs import FIRST, MERGED, SECOND, write_merged
from tests.models.folders import CONFIG, GENAI_CONFIG, HIDDEN, write_decoder, write_folder, write_pair_folder

MAGNITUDE: dict[str, Any] = {"method": "select", "criterion": "magnitude"}
BY_MAGNITUDE = ("--method", "select", "--criterion", "magnitude")

# what transformers.js asks for by dtype, and a type of weights that only such a file has
NAMES = {
    "fp16": ("model_fp16.onnx", onnx.TensorProto.FLOAT16),
    "q8": ("model_quantized.onnx", onnx.TensorProto.INT8),
    "int8": ("model_int8.onnx", onnx.TensorProto.INT8),
    "uint8": ("model_uint8.onnx", onnx.TensorProto.UINT8),
    "q4": ("model_q4.onnx", onnx.TensorProto.UINT8),
    "q4f16": ("model_q4f16.onnx", onnx.TensorProto.FLOAT16),
    "bnb4": ("model_bnb4.onnx", onnx.TensorProto.UINT8),
}


def weight_types(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_a_folder_with_every_precision(tmp_path: Path) -> None:
    """Each file runs in onnxruntime alone, has the weights that its name says, and is close to the pruned model."""
    source = write_folder(tmp_path / "llama")
    write_decoder(source / "model_q4.onnx")
    folder = snpc.prune_folder(
        source, tmp_path / "out", ratio=0.5, roles=("ffn",), uniform=True, precisions=("fp32", *NAMES), **MAGNITUDE
    )
    assert folder.model.path == tmp_path / "out" / "onnx" / "model.onnx"
    assert {p.name for p in (tmp_path / "out" / "onnx").glob("*.onnx")} == {
        "model.onnx",
        *(n for n, _ in NAMES.values()),
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**CONFIG, "intermediate_size": HIDDEN // 2}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not folder.conversions, "the other precision that was left out is made again"
    reference = outputs(folder.model.path)
    for written in folder.precisions:
        name, weights = NAMES[written.precision]
        assert written.path == tmp_path / "out" / "onnx" / name and weights in weight_types(written.path)
        scale = np.sqrt(np.mean(reference**2))
        gap = np.sqrt(np.mean((outputs(written.path) - reference) ** 2)) / scale
        assert gap < {"fp16": 0.01, "q8": 0.1, "int8": 0.1, "uint8": 0.1}.get(written.precision, 0.5)
        assert written.difference < 0.5
        pruned, converted = read_provenance(snpc.load(written.path).graph)
        assert pruned["step"] == "prune" and converted["step"] == "convert"
        assert converted["precision"] == written.precision and converted["source"] == "model.onnx"


def outputs(path: Path) -> Any:
    """Logits of onnxruntime itself, without snpc."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for spec in session.get_inputs():
        shape = [size if isinstance(size, int) else {"batch": 2}.get(size, 5) for size in spec.shape]
        if "past" in spec.name:
            feeds[spec.name] = np.zeros([*shape[:2], 0, shape[3]], np.float32)
        elif "mask" in spec.name:
            feeds[spec.name] = np.ones(shape, np.int64)
        else:
            feeds[spec.name] = rng.integers(2, 20, shape)
    return session.run(["logits"], feeds)[0]


def test_one_model_becomes_a_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    (source / "notes.txt").write_text("mine")
    report = reported(
        "prune", source / "model.onnx", "--ratio", 0.5, "--uniform", *BY_MAGNITUDE,
        "--precisions", "fp32,q8", "-o", source / "small",
    )  # fmt: skip
    files = {str(p.relative_to(source / "small")) for p in (source / "small").rglob("*") if p.is_file()}
    assert {"config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model_quantized.onnx"} <= files
    assert "notes.txt" not in files
    (written,) = report["folder"]["precisions"]
    assert written["path"] == str(source / "small" / "onnx" / "model_quantized.onnx") and written["bytes"] > 0
    said = invoke("prune", source / "model.onnx", "--ratio", 0.5, *BY_MAGNITUDE, "-o", f"{tmp_path / 'plain'}/")
    assert (tmp_path / "plain" / "onnx" / "model.onnx").is_file() and "folder: " in said.stdout
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llama"


def test_companions_have_the_same_precisions(tmp_path: Path) -> None:
    source = write_pair_folder(tmp_path / "bart", cross=False)
    folder = snpc.prune_folder(source, tmp_path / "out", ratio=0.5, precisions=("q8",), **MAGNITUDE)
    endings = [Path(FIRST).stem, Path(SECOND).stem]
    assert sorted(w.path.name for w in folder.precisions) == [f"{stem}_quantized.onnx" for stem in sorted(endings)]


def test_both_branches_of_a_merged_decoder_have_the_precision(tmp_path: Path) -> None:
    """As one file in onnxruntime: without a past, and with one."""
    pruned = snpc.prune(write_merged(tmp_path / MERGED, cross=False), tmp_path / "half.onnx", ratio=0.5, **MAGNITUDE)
    session = onnxruntime.InferenceSession(pruned.path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    caches = {
        spec.name: rng.standard_normal([2, spec.shape[1], 3, spec.shape[3]]).astype(np.float32)
        for spec in session.get_inputs()
        if "past" in spec.name
    }
    batches = [
        {**caches, "input_ids": ids, "use_cache_branch": np.array([use])}
        for ids, use in ((np.array([[1, 2, 3], [4, 5, 6]]), False), (np.array([[7], [8]]), True))
    ]
    expected = [session.run(["logits"], feeds)[0] for feeds in batches]
    for written in write_precisions(pruned.path, ("fp16", "q8", "q4", "q4f16")):
        onnx.checker.check_model(onnx.load(written.path))
        assert NAMES[written.precision][1] in weight_types(written.path)
        small = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
        for feeds, logits in zip(batches, expected, strict=True):
            gap = np.linalg.norm(small.run(["logits"], feeds)[0] - logits) / np.linalg.norm(logits)
            assert 0 < gap < {"fp16": 0.01, "q8": 0.1}.get(written.precision, 0.5)
        steps = read_provenance(snpc.load(written.path).graph)
        assert [step["step"] for step in steps] == ["prune", "convert"]


def test_what_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    refused = invoke("prune", source, "--ratio", 0.5, "--precisions", "q5", code=2)
    assert "--precisions q5: choose from fp32, fp16, q8" in refused.stderr
    genai = write_folder(tmp_path / "genai", "decoder.onnx", {"genai_config.json": GENAI_CONFIG})
    with pytest.raises(UserError, match="leave out --precisions"):
        snpc.prune_folder(genai, tmp_path / "out", ratio=0.5, precisions=("q8",))
    with pytest.raises(UserError, match="prune the folder"):
        snpc.prune_folder(genai / "decoder.onnx", tmp_path / "out", ratio=0.5)
    folder = snpc.prune_folder(source, tmp_path / "made", ratio=0.5, precisions=("q8",), **MAGNITUDE)
    with pytest.raises(UserError, match="is quantized: leave out --precisions"):
        snpc.prune_folder(folder.precisions[0].path, tmp_path / "out", ratio=0.5, precisions=("q4",))
    assert not (tmp_path / "out").exists()


def test_a_file_that_says_something_else_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "llama")
    monkeypatch.setattr("snpc.targets.precisions.max_relative", lambda differences: 0.9)
    with pytest.raises(CheckFailed, match=r"out/onnx/model_q4.onnx: its outputs differ by 0.9 .* leave q4 out"):
        snpc.prune_folder(source, tmp_path / "out", ratio=0.5, precisions=("q4",), **MAGNITUDE)
    assert not (tmp_path / "out").exists()


def test_weights_of_models_with_convolutions_have_no_sign(tmp_path: Path) -> None:
    """Not every onnxruntime has kernels for convolutions with signed ones."""
    snpc.write_example("digits", tmp_path / "digits")
    model = tmp_path / "digits" / "digits_vit.onnx"
    folder = snpc.prune_folder(model, tmp_path / "out", ratio=0.5, precisions=("q8",), **MAGNITUDE)
    assert folder.precisions[0].path.name == "model_quantized.onnx"
    assert onnx.TensorProto.INT8 not in weight_types(folder.precisions[0].path)
