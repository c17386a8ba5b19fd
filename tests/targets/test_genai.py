"""Tokens that onnxruntime-genai generates."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from snpc.errors import UserError
from snpc.targets.genai import generate_tokens
from tests.models.folders import write_genai_folder


def test_it_generates_as_many_tokens_as_are_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = write_genai_folder(tmp_path / "llama")
    assert [len(generate_tokens(folder, (3, 5, 7), count)) for count in (1, 2)] == [1, 2]


def test_a_folder_that_it_does_not_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UserError, match="onnxruntime-genai does not run it"):
        generate_tokens(tmp_path, (3, 5, 7), 4)


def test_the_module_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that counts on from the last token, and ends at 9."""

    class Generator:
        def __init__(self, model: str, options: object) -> None:
            self.tokens: list[int] = []

        def append_tokens(self, ids: list[list[int]]) -> None:
            self.tokens += list(ids[0])

        def generate_next_token(self) -> None:
            self.tokens.append(int(self.tokens[-1]) + 1)

        def get_next_tokens(self) -> list[int]:
            return self.tokens[-1:]

        def is_done(self) -> bool:
            return bool(self.tokens) and self.tokens[-1] == 9

    options = SimpleNamespace(set_search_options=lambda **_: None)
    fake = SimpleNamespace(Model=str, GeneratorParams=lambda model: options, Generator=Generator)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    assert generate_tokens(tmp_path, (3, 5, 7), 4) == [8, 9]
