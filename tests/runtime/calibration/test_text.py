"""Text as calibration data: windows and lines hold the tokenizer's tokens, and each refusal says what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.runtime.calibration import text as text_module
from snpc.types import TensorSpec
from tests.command_line import invoke, reported
from tests.models.language import Language, as_text, write_tokenizer

pytest.importorskip("tokenizers")

IDS = TensorSpec("input_ids", np.dtype(np.int64), ("batch", "tokens"))
MASK = TensorSpec("attention_mask", np.dtype(np.int64), ("batch", "tokens"))
POSITIONS = TensorSpec("position_ids", np.dtype(np.int64), ("batch", "tokens"))
DECODER = (IDS, MASK, POSITIONS)
NUMBERS = np.random.default_rng(0).integers(2, 24, (20, 7))


def joined(source: Path, inputs: tuple[TensorSpec, ...] = DECODER, **options: Any) -> dict[str, np.ndarray]:
    text = snpc.TextOptions(source.parent, **options)
    feeds = list(snpc.load_calibration(source, inputs, text=text, held_out=0, samples=1000).batches())
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def write_text(folder: Path, words: str | None = None) -> Path:
    (folder / "book.txt").write_text(words if words is not None else as_text(NUMBERS))
    return folder / "book.txt"


def write_lines(folder: Path, samples: list[Any], name: str = "samples.jsonl") -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, samples)) + "\n")
    return folder / name


def test_a_long_text_becomes_full_windows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    fed = joined(write_text(tmp_path), seq_len=6)
    np.testing.assert_array_equal(fed["input_ids"], NUMBERS.reshape(-1)[: 23 * 6].reshape(23, 6))
    assert (fed["attention_mask"] == 1).all()
    assert (fed["position_ids"] == np.arange(6)).all()


def test_every_window_has_the_tokens_that_the_tokenizer_adds(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, around="both")
    ids = joined(write_text(tmp_path), seq_len=6)["input_ids"]
    assert (ids[:, 0] == 0).all()
    assert (ids[:, -1] == 1).all()
    np.testing.assert_array_equal(ids[:, 1:-1], NUMBERS.reshape(-1, 4))


def test_a_text_of_several_blocks_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 60)  # some three lines
    ids = joined(write_text(tmp_path), seq_len=7)["input_ids"]
    np.testing.assert_array_equal(ids, NUMBERS)


def test_no_more_of_a_text_is_read_than_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 1)  # a line
    monkeypatch.setattr(text_module, "MAX_TEXT_BYTES", 60)
    ids = joined(write_text(tmp_path), seq_len=7)["input_ids"]
    assert 2 <= len(ids) <= 4
    np.testing.assert_array_equal(ids, NUMBERS[: len(ids)])


def test_lines_are_padded_with_the_mask_and_cut(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = write_lines(tmp_path, [{"text": "w5 w6"}, {"text": ""}, {"text": "w3 w4 w5 w6 w7 w8"}])
    fed = joined(path, seq_len=4)
    np.testing.assert_array_equal(fed["attention_mask"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(fed["input_ids"] * fed["attention_mask"], [[5, 6, 0, 0], [3, 4, 5, 6]])
    np.testing.assert_array_equal(fed["position_ids"], [[0, 1, 1, 1], [0, 1, 2, 3]])


def test_lines_are_no_longer_than_the_longest_unless_the_model_says(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = write_lines(tmp_path, [{"text": "w5 w6"}, {"text": "w7 w8 w9"}])
    assert joined(path)["input_ids"].shape == (2, 3)
    static = tuple(TensorSpec(spec.name, spec.dtype, ("batch", 5)) for spec in DECODER)
    assert joined(path, static)["input_ids"].shape == (2, 5)


def test_without_a_mask_lines_follow_each_other(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = write_lines(tmp_path, [{"text": "w5 w6"}, {"text": "w7"}, {"text": "w8 w9 w3"}])
    fed = joined(path, (IDS,), seq_len=3)
    np.testing.assert_array_equal(fed["input_ids"], [[5, 6, 7], [8, 9, 3]])


def test_another_field_and_empty_lines(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text('{"body": "w5 w6", "text": 3}\n\n{"body": "w7 w8"}\n')
    np.testing.assert_array_equal(joined(path, field="body")["input_ids"], [[5, 6], [7, 8]])


def test_the_length_is_the_models_then_128(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = write_text(tmp_path, as_text(np.tile(NUMBERS, (4, 1))))
    assert joined(path)["input_ids"].shape == (4, 128)
    static = (TensorSpec("input_ids", np.dtype(np.int32), ("batch", 10)),)
    ids = joined(path, static)["input_ids"]
    assert ids.shape == (56, 10)
    assert ids.dtype == np.int32
    with pytest.raises(UserError, match=r"--seq-len 12: input 'input_ids' takes 10 tokens; leave it out"):
        joined(path, static, seq_len=12)


def test_settings_of_the_tokenizer_do_not_cut_or_pad(tmp_path: Path) -> None:
    """Tokenizers of sentence encoders pad to a length of their own."""
    import tokenizers

    file = str(write_tokenizer(tmp_path))
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(file)
    np.testing.assert_array_equal(joined(write_text(tmp_path), seq_len=7)["input_ids"], NUMBERS)


def test_described(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path)
    calibration = snpc.load_calibration(
        write_text(tmp_path), DECODER, samples=10, text=snpc.TextOptions(file, seq_len=7)
    )
    assert calibration.describe() == (
        f"10 of 20 samples from {tmp_path / 'book.txt'}, 8 per batch, 10 others held out, windows of 7 tokens, "
        f"by {file}, "
        "filled in: attention_mask (ones), position_ids (counted)"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "w5 w6", r"a\.jsonl, line 1: JSONDecodeError: .*: every line is an object such as"),
        ("a.jsonl", '{"text": "w5"}\n["w5"]', r"a\.jsonl, line 2: it is a list: every line is an object"),
        ("a.jsonl", '{"body": "w5", "id": 3}', r"line 1: it has no field 'text', but body, id: name one \(--text"),
        ("a.jsonl", '{"text": 5}', r"line 1: field 'text' holds a int, not a text"),
        ("a.jsonl", "", r"a\.jsonl: it holds no text"),
        ("a.jsonl", '{"text": ""}', r"a\.jsonl: it holds no text"),
        ("a.txt", "", r"a\.txt: it holds no text"),
        ("a.txt", "w5 w6", r"a\.txt: its 2 tokens do not fill a window of 128: give more text, or a smaller --seq-len"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: UnicodeDecodeError: .*: it cannot be read as UTF-8"),
    ],
)
def test_text_that_cannot_be_used(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        joined(tmp_path / name)


def test_a_tokenizer_is_needed_and_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path)

    def load(tokenizer: Path | None, **options: Any) -> None:
        snpc.load_calibration(path, DECODER, text=snpc.TextOptions(tokenizer, **options))

    with pytest.raises(UserError, match=r"book\.txt: text needs the model's tokenizer: .* \(--tokenizer\)"):
        load(None)
    with pytest.raises(UserError, match=r"it holds no tokenizer\.json; transformers writes one"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: Exception: .*: it is no tokenizer\.json of the package"):
        load(tmp_path)
    write_tokenizer(tmp_path, around="both")
    with pytest.raises(UserError, match="--seq-len 2: the tokenizer adds 2 tokens to every sample; give more"):
        load(tmp_path, seq_len=2)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"reading text needs tokenizers: pip install snpc\[text\]"):
        load(tmp_path)


def test_a_model_that_takes_no_ids_gets_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    image = TensorSpec("image", np.dtype(np.float32), ("batch", 3, 8, 8))
    with pytest.raises(UserError, match=r"it holds text, and none of the model's inputs \(image\) is known to take"):
        joined(write_text(tmp_path), (image,))


@pytest.mark.parametrize(("options", "words"), [({"seq_len": 1}, "at least two"), ({"field": ""}, "--text-field")])
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        snpc.TextOptions("tokenizer.json", **options)


@pytest.fixture
def decoder_folder(tmp_path: Path) -> Path:
    """``onnx/model.onnx`` with caches, a tokenizer beside ``onnx``, and a text that the model knows."""
    decoder = Language(cached=True, sharpness=3)
    (tmp_path / "onnx").mkdir()
    onnx.save(decoder.model(), tmp_path / "onnx" / "model.onnx")
    write_tokenizer(tmp_path)
    write_text(tmp_path, as_text(decoder.sample(40, 8)))
    return tmp_path


def test_the_one_call_finds_the_tokenizer(decoder_folder: Path) -> None:
    text = decoder_folder / "book.txt"
    text.write_text(text.read_text() * 20)
    result = snpc.prune(decoder_folder / "onnx" / "model.onnx", ratio=0.25, calibration=text)
    assert "windows of 128 tokens" in result.calibration


def test_commands_take_text(decoder_folder: Path) -> None:
    model, text = decoder_folder / "onnx" / "model.onnx", decoder_folder / "book.txt"
    data = ("--calib", text, "--seq-len", 8, "--calib-samples", 20)
    report = reported("prune", model, "--ratio", 0.25, *data, "-o", decoder_folder / "half.onnx")
    assert "windows of 8 tokens" in report["calibration"]["text"]
    run = invoke("verify", model, decoder_folder / "half.onnx", *data, "--tokenizer", decoder_folder)
    assert f"40 windows of 8 tokens, by {decoder_folder / 'tokenizer.json'}" in run.stderr
    invoke("bench", model, *data[:-2], "--iterations", 1, "--batch", 2)
