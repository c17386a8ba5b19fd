"""Models that say less: some entries of the vocabulary, or logits of the last position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import snpc
from snpc.targets.restrict import read_vocabulary
from tests.command_line import invoke, reported
from tests.models.exports import export
from tests.oracle import feeds_of, run

NAMES = ("gpt2__ts17", "llama__dyn20", "llama__ts17")  # tied embeddings, and their own
KEPT = [0, 1, 2, 5, 7, 11, 12, 13, 20, 21, 30, 31, 44, 60]


def kept_feeds(name: str, length: int = 11) -> tuple[dict[str, Any], dict[str, Any]]:
    """(feeds of the original that hold kept ids alone, the same for the restricted model)."""
    rng = np.random.default_rng(3)
    places = rng.integers(0, len(KEPT), (3, length))
    ids = next(n for n in feeds_of(name) if "ids" in n)
    rest = {n: np.ones((3, length), a.dtype) for n, a in feeds_of(name).items() if n != ids}
    return {ids: np.array(KEPT)[places], **rest}, {ids: places, **rest}


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_kept_entries_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    small = snpc.restrict(export(name), tmp_path / "small.onnx", vocabulary=KEPT[::-1])
    before, after = kept_feeds(name)
    found = run(small.path, after)[0]
    np.testing.assert_allclose(found, run(export(name), before)[0][..., KEPT], rtol=1e-5, atol=1e-5)
    mapping = json.loads((tmp_path / "small.vocabulary.json").read_text())
    assert mapping == {str(old): new for new, old in enumerate(KEPT)}
    metadata = ort.InferenceSession(small.path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["snpc.vocabulary"]) == KEPT


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_is_gone_from_the_file(name: str, tmp_path: Path) -> None:
    small = snpc.restrict(export(name), tmp_path / "small.onnx", vocabulary=KEPT)
    sizes = {n for i in onnx.load(small.path).graph.initializer if len(i.dims) == 2 for n in i.dims}
    assert len(KEPT) in sizes and 61 not in sizes


@pytest.mark.parametrize("ratio", [None, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_last_logits_are_those_of_the_last_position(name: str, ratio: float | None, tmp_path: Path) -> None:
    """At several lengths: the position is counted from the end."""
    options: dict[str, Any] = {} if ratio is None else {"ratio": ratio}
    written = tmp_path / "last.onnx"
    snpc.prune(export(name), written, last_logits=True, **options)
    plain = tmp_path / "plain.onnx"
    if ratio is not None:
        snpc.prune(export(name), plain, **options)
    for length in (2, 5, 9):
        feeds, _ = kept_feeds(name, length)
        expected = run(export(name) if ratio is None else plain, feeds)[0][:, -1:]
        np.testing.assert_allclose(run(written, feeds)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("llama__dyn20", 0.6), ("llama__ts17", 0.6), ("gpt2__ts17", 0.97)])
def test_rows_that_only_other_positions_need_are_not_computed(name: str, most: float) -> None:
    """Of the last of two layers only keys and values need all rows; GPT-2 merges samples and rows in front of each
    layer, so there it is the norm and the logits."""
    result = snpc.prune(export(name), last_logits=True)
    assert result.after.macs < most * result.before.macs


def test_one_call_with_data_renumbers_ids_and_leaves_others_out(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).choice(KEPT, (24, 9))
    ids[::4, 3] = 3  # no kept id
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    (tmp_path / "kept.txt").write_text("\n".join(map(str, KEPT)))
    written = tmp_path / "small.onnx"
    result = snpc.prune(
        export("llama__dyn20"), written, vocabulary=tmp_path / "kept.txt", ratio=0.2, calibration=tmp_path / "ids.npz"
    )
    assert result.data is not None and result.data.available == 18
    assert "6 of 24 hold others" in result.data.describe()
    held_out = next(result.data.held_out.batches())["input_ids"]  # type: ignore[union-attr]
    assert set(np.array(KEPT)[held_out].ravel()) <= set(KEPT)
    perplexity = result.verification.quality.perplexity
    assert perplexity is not None and perplexity.before == pytest.approx(by_hand(held_out), rel=1e-4)
    assert (tmp_path / "small.vocabulary.json").is_file()


def by_hand(places: np.ndarray[Any, Any]) -> float:
    """Perplexity over the kept entries, of the original."""
    ids = np.array(KEPT)[places]
    logits = run(export("llama__dyn20"), {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][..., KEPT]
    shifted = logits - logits.max(-1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows, columns = np.indices(places[:, 1:].shape)
    return float(np.exp(-log[rows, columns, places[:, 1:]].mean()))


def test_command(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps({f"token{k}": k for k in KEPT}))
    written = tmp_path / "small.onnx"
    options = ("--vocabulary", tmp_path / "ids.json", "--last-logits", "-o", written)
    found = reported("prune", export("llama__dyn20"), *options)
    assert found["restricted"]["vocabulary"] == {"kept": len(KEPT), "of": 61}
    assert found["restricted"]["last_logits"] is True
    before, after = kept_feeds("llama__dyn20")
    expected = run(export("llama__dyn20"), before)[0][:, -1:, KEPT]
    np.testing.assert_allclose(run(written, after)[0], expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "small.vocabulary.json").is_file()


class TestRefused:
    def test_models_without_ids_or_logits(self) -> None:
        with pytest.raises(snpc.UserError, match="takes no token ids"):
            snpc.restrict(export("mlp__ts17"), last_logits=True)
        with pytest.raises(snpc.UserError, match="no output with logits"):
            snpc.restrict(export("bert__ts17"), last_logits=True)

    def test_ids_that_the_model_reads_themselves(self, tmp_path: Path) -> None:
        model = onnx.load(export("llama__dyn20"))
        model.graph.node.insert(0, onnx.helper.make_node("Neg", ["input_ids"], ["negative"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("negative", 7, [None, None]))
        onnx.save(model, tmp_path / "reads.onnx")
        with pytest.raises(snpc.UserError, match="reads the token ids themselves"):
            snpc.restrict(tmp_path / "reads.onnx", vocabulary=KEPT)

    @pytest.mark.parametrize("text", ["[]", "[1]", '["a"]', "{", "[1, -2]", "[true, false]", "3"])
    def test_files_without_ids(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "ids.json").write_text(text)
        with pytest.raises(snpc.UserError, match=r"ids.json: holds"):
            read_vocabulary(tmp_path / "ids.json")

    def test_entries_that_are_not_there(self) -> None:
        with pytest.raises(snpc.UserError, match="entry 61 of the vocabulary is not among its 61"):
            snpc.restrict(export("llama__dyn20"), vocabulary=[0, 61])

    def test_data_without_kept_ids(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "ids.npz", input_ids=np.full((4, 5), 3))
        with pytest.raises(snpc.UserError, match="each of its 4 samples holds ids that are not in the vocabulary"):
            snpc.prune(export("llama__dyn20"), vocabulary=KEPT, ratio=0.2, calibration=tmp_path / "ids.npz")

    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "model.onnx").write_bytes(Path(export("llama__dyn20")).read_bytes())
        (tmp_path / "ids.txt").write_text("0 1 2")
        shown = invoke("prune", tmp_path / "folder", "--vocabulary", tmp_path / "ids.txt", code=2).output
        assert "its tokenizer gives the old ids" in " ".join(shown.split())


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(snpc.UserError, match=r"missing\.json: cannot be read \(No such file"):
        read_vocabulary(tmp_path / "missing.json")
