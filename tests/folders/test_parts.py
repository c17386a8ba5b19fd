"""An encoder and its decoder, cut by one command and checked together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.folders import ModelParts, PrunedFolder, find_model_folder
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION
from tests.command_line import invoke, reported
from tests.models.decoder_pairs import (
    ENCODER,
    FIRST,
    HIDDEN,
    MERGED,
    PROMPT,
    SECOND,
    logits_at_once,
    logits_in_steps,
    whole_data,
    write_merged,
)
from tests.models.folders import PAIR_CONFIG, write_pair_folder

Array = npt.NDArray[Any]
MAGNITUDE: dict[str, Any] = {"method": "select", "criterion": "magnitude"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("whole") / "bart")


@pytest.fixture(scope="module")
def calibration(source: Path) -> Calibration:
    return snpc.load_calibration(whole_data(24), ModelParts.of(find_model_folder(source)).inputs)


@pytest.fixture(scope="module")
def fitted(source: Path, calibration: Calibration) -> PrunedFolder:
    merged, target = source.parent / "merged", source.parent / "fitted"
    shutil.copytree(source, merged)
    write_merged(merged / MERGED)
    return snpc.prune_folder(merged, target, ratio=0.4, effort="quick", prune_kv_cache=True, calibration=calibration)


def decoder_feeds(folder: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """What the decoder reads behind the encoder of a folder."""
    session = ort.InferenceSession(folder / ENCODER, providers=["CPUExecutionProvider"])
    states = session.run(None, {k: v for k, v in feeds.items() if k != "decoder_input_ids"})[0]
    return {
        "input_ids": feeds["decoder_input_ids"],
        "encoder_hidden_states": np.asarray(states),
        "encoder_attention_mask": feeds["attention_mask"],
    }


def test_both_parts_are_written_and_decode_together(
    source: Path, calibration: Calibration, fitted: PrunedFolder
) -> None:
    assert fitted.encoder is not None and fitted.whole is not None and fitted.whole.quality is not None
    assert {p.name for p in fitted.path.iterdir()} == {ENCODER, FIRST, SECOND, MERGED, "config.json"}
    for result in (fitted.encoder, fitted.model):
        assert result.after.macs < 0.9 * result.before.macs and result.path.parent == fitted.path
    assert sorted(check.split()[0] for check in fitted.whole.checks) == [MERGED, SECOND]
    assert all("behind the pruned encoder: decoding step by step" in check for check in fitted.whole.checks)
    assert calibration.held_out is not None
    (held_out,) = calibration.held_out.batches()
    feeds = decoder_feeds(fitted.path, held_out)
    at_once = logits_at_once(fitted.path / FIRST, feeds)
    steps = logits_in_steps(fitted.path / FIRST, fitted.path / SECOND, feeds)
    assert np.abs(steps - at_once[:, PROMPT:]).max() < 1e-5 * np.abs(at_once).max()
    difference = np.abs(at_once - logits_at_once(source / FIRST, decoder_feeds(source, held_out))).max()
    (judged,) = fitted.whole.quality.differences
    assert judged.max_abs_diff == pytest.approx(difference, rel=1e-4), "each decoder behind its own encoder"
    assert fitted.whole.quality.held_out and fitted.whole.quality.samples == len(at_once)


def test_the_decoder_is_fitted_to_the_states_of_the_pruned_encoder(
    calibration: Calibration, fitted: PrunedFolder
) -> None:
    assert fitted.model.data is not None and fitted.encoder is not None and fitted.encoder.data is not None
    pairs = zip(calibration.batches(), fitted.encoder.data.batches(), fitted.model.data.batches(), strict=True)
    for whole, encoder, decoder in pairs:
        assert set(encoder) == {"input_ids", "attention_mask"}
        expected = decoder_feeds(fitted.path, whole)
        assert set(decoder) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(decoder[name], array, rtol=1e-5, atol=1e-6)
    held_out = [part.held_out for part in (calibration, fitted.encoder.data, fitted.model.data)]
    assert len({part.samples for part in held_out if part is not None}) == 1 and None not in held_out


def test_a_second_decoder_of_another_cut_is_found(source: Path, fitted: PrunedFolder, tmp_path: Path) -> None:
    assert fitted.encoder is not None
    parts = ModelParts.of(find_model_folder(source))
    other = snpc.prune_folder(source, tmp_path / "other", ratio=0.4, **MAGNITUDE, prune_kv_cache=True)
    kept = (fitted.path / SECOND).read_bytes()
    try:
        shutil.copy(other.path / SECOND, fitted.path / SECOND)
        with pytest.raises(CheckFailed, match="decoding step by step through the caches"):
            parts.checks(fitted.encoder, fitted.model, None, DEFAULT_EXECUTION)
    finally:
        (fitted.path / SECOND).write_bytes(kept)


def test_one_command_without_data(source: Path, tmp_path: Path) -> None:
    options = ("--ratio", 0.5, "--uniform", "--method", "select", "--criterion", "magnitude")
    result = invoke("prune", source, *options, "-o", tmp_path / "half")
    words = " ".join((result.stdout + result.stderr).split())
    assert f"{SECOND} behind the pruned encoder: decoding step by step" in words
    halved = dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), HIDDEN // 2)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {**PAIR_CONFIG, **halved}
    # two layers, keys and values, three heads of eight channels, float32
    stay = 2 * 2 * 3 * 8 * 4
    assert f"key/value caches stay at {stay} bytes per token: no genai_config.json says their width" in words
    assert f"--prune-kv-cache makes them about {stay // 2}:" in words


def test_parts_in_folders_of_their_own(source: Path, tmp_path: Path) -> None:
    """As Mobius writes them, whose decoder is one model with caches."""
    for part, file in (("encoder", ENCODER), ("decoder", FIRST)):
        (tmp_path / "whole" / part).mkdir(parents=True)
        shutil.copy(source / file, tmp_path / "whole" / part / "model.onnx")
    found = snpc.prune_folder(tmp_path / "whole", tmp_path / "half", ratio=0.5, **MAGNITUDE)
    assert found.encoder is not None and found.encoder.path == tmp_path / "half" / "encoder" / "model.onnx"
    assert found.model.path == tmp_path / "half" / "decoder" / "model.onnx" and found.model.path.is_file()


def test_one_command_with_data_in_a_file(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **whole_data(8))
    options = ("--ratio", 0.5, "--roles", "ffn", "--effort", "quick", "--calib", tmp_path / "data.npz")
    report = reported("prune", source, *options, "-o", tmp_path / "half")
    assert report["encoder"]["model"].endswith(ENCODER) and report["model"].endswith(FIRST)
    assert report["folder"]["whole"]["quality"]["differences"][0]["output"] == "logits"
    planned = reported("prune", source, *options, "--dry-run", "-o", tmp_path / "none")
    assert set(planned["groups"]) == {ENCODER, FIRST} and not (tmp_path / "none").exists()
    np.savez(tmp_path / "part.npz", **{k: v for k, v in whole_data(8).items() if k != "decoder_input_ids"})
    refused = invoke("prune", source, *options[:-1], tmp_path / "part.npz", "-o", tmp_path / "none", code=2)
    assert "no data for input decoder_input_ids" in refused.stderr


def test_a_part_that_cannot_be_cut_so_far_is_named(source: Path, tmp_path: Path) -> None:
    """With caches as wide as they are, and a head over the vocabulary, the decoder has less to give."""
    with pytest.raises(
        UserError, match=rf"^decoder {FIRST}: target macs=0.5 cannot be reached.*--file cuts one of them$"
    ):
        snpc.prune_folder(source, tmp_path / "half", target="macs=0.5", **MAGNITUDE)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("option", [("--plan", "p.json"), ("--tokens", "merge:2"), ("--report", "r.html")])
def test_options_for_one_model_are_refused(option: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    refused = invoke("prune", source, "--ratio", 0.5, *option, "-o", tmp_path / "half", code=2)
    assert f"{option[0]} is for one model, and encoder and decoder are cut: name one" in " ".join(
        refused.stderr.split()
    )


def test_data_of_one_part_is_refused(source: Path, calibration: Calibration, tmp_path: Path) -> None:
    part = calibration.restricted_to(snpc.load(source / ENCODER).inputs)
    with pytest.raises(UserError, match="is for one part, and lacks decoder_input_ids"):
        snpc.prune_folder(source, tmp_path / "half", ratio=0.5, calibration=part)
