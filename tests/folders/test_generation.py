"""What the runtime of a folder generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.folders import generation
from snpc.folders.generation import GENERATED, PROMPT_IDS, check_generation
from snpc.folders.model_folder import find_model_folder
from snpc.runtime.evaluation import RunningDecoder, decoder_interface, likelihood_gap
from snpc.runtime.execution import DEFAULT_EXECUTION, file_session
from snpc.targets import generate_tokens
from tests.command_line import reported
from tests.models.folders import write_folder, write_genai_folder

MAGNITUDE: dict[str, Any] = {"method": "select", "criterion": "magnitude"}


def greedy_tokens(folder: Path) -> list[int]:
    """By onnxruntime, all tokens read anew for each."""
    path = folder / "model.onnx"
    interface = decoder_interface(snpc.load(path))
    assert interface is not None
    tokens: list[int] = []
    with file_session(path) as run:
        for _ in range(GENERATED):
            ids = np.array([[*PROMPT_IDS, *tokens]])
            tokens.append(int(run(interface.feeds(ids, 0, interface.empty_caches()))["logits"][0, -1].argmax()))
        assert likelihood_gap(RunningDecoder(interface, run), PROMPT_IDS, tokens) == 0
        assert likelihood_gap(RunningDecoder(interface, run), PROMPT_IDS, [*tokens[:-1], (tokens[-1] + 1) % 64]) > 0
    return tokens


def test_genai_generates_what_the_pruned_model_stands_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    source = write_genai_folder(tmp_path / "llama")
    found = snpc.prune_folder(source, tmp_path / "half", ratio=0.5, uniform=True, **MAGNITUDE)
    assert found.generation.startswith("onnxruntime-genai generates the tokens")
    assert found.changed[Path("genai_config.json")] == ("head_size 32 -> 16",)
    assert generate_tokens(tmp_path / "half", PROMPT_IDS, GENERATED) == greedy_tokens(tmp_path / "half")


def stand_in(monkeypatch: pytest.MonkeyPatch, tokens_of: Any) -> None:
    monkeypatch.setattr(generation, "has_genai", lambda: True)
    monkeypatch.setattr(generation, "generate_tokens", lambda folder, prompt, count: tokens_of(folder))


def test_other_tokens_than_those_of_the_model_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_genai_folder(tmp_path / "llama")
    dense = greedy_tokens(source)
    stand_in(monkeypatch, lambda folder: dense if folder == source else [0] * GENERATED)
    with pytest.raises(CheckFailed, match=r"half: onnxruntime-genai generates \[0, .*; the original folder generates"):
        snpc.prune_folder(source, tmp_path / "half", ratio=0.5, **MAGNITUDE)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_the_result_says_what_was_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_genai_folder(tmp_path / "llama")
    stand_in(monkeypatch, greedy_tokens)
    report = reported("prune", source, "--ratio", 0.5, "--method", "select", "--criterion", "magnitude")
    assert report["folder"]["generation"] == "onnxruntime-genai generates the tokens that onnxruntime finds most likely"


def test_a_folder_that_never_generated_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[int]:
        raise UserError(f"{folder}: onnxruntime-genai does not run it: no tokenizer")

    source = write_genai_folder(tmp_path / "llama")
    stand_in(monkeypatch, refuse)
    found = snpc.prune_folder(source, tmp_path / "half", ratio=0.5, **MAGNITUDE)
    assert found.generation.startswith("generation was not compared: of the original folder too")


def test_folders_of_other_runtimes_are_not_generated_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda folder: pytest.fail("no genai_config.json"))
    source = find_model_folder(write_folder(tmp_path / "llama"))
    assert not check_generation(source, source.path, DEFAULT_EXECUTION)
