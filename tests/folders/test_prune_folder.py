"""A folder in, a folder out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import snpc
from snpc.errors import UserError
from tests.command_line import invoke, reported
from tests.models.decoder_pairs import FIRST, MERGED, SECOND, write_merged
from tests.models.decoder_pairs import HIDDEN as HIDDEN_UNITS
from tests.models.experts import CHOSEN, COUNT
from tests.models.experts import HIDDEN as EXPERT_UNITS
from tests.models.exports import export
from tests.models.folders import (
    CONFIG,
    GENAI_CONFIG,
    HIDDEN,
    PAIR_CONFIG,
    write_decoder,
    write_folder,
    write_pair_folder,
)

MAGNITUDE: dict[str, Any] = {"method": "select", "criterion": "magnitude"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_model_is_cut_and_everything_else_goes_with_it(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama", "onnx/model.onnx")
    write_decoder(source / "onnx" / "model_q4.onnx")
    before = content(source)
    found = snpc.prune_folder(source, tmp_path / "half", ratio=0.5, roles=("ffn",), uniform=True, **MAGNITUDE)
    assert content(source) == before
    assert found.model.path == tmp_path / "half" / "onnx" / "model.onnx"
    assert snpc.load(found.model.path).inputs == snpc.load(source / "onnx" / "model.onnx").inputs
    assert found.model.after.macs < found.model.before.macs
    assert (tmp_path / "half" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert [path.name for path in found.left_out] == ["model_q4.onnx", "model_q4.onnx.data"]
    ((form, command),) = found.conversions.items()
    assert form == Path("onnx/model_q4.onnx")
    assert command.startswith("python -m onnxruntime.quantization.matmul_nbits_quantizer")
    assert f"--input_model {found.model.path} --output_model {tmp_path / 'half' / form}" in command
    assert not (tmp_path / "half" / ".git").exists()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == {**CONFIG, "intermediate_size": HIDDEN // 2}, "and no other number that happens to be the same"


def test_widths_that_differ_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    selected = ("--roles", "ffn", "--include", r"\b0\b|_0|\.0\.", "--method", "select", "--criterion", "magnitude")
    result = invoke("prune", source, "--ratio", 0.5, *selected, "-o", tmp_path / "half")
    assert "config.json: intermediate_size stays 96: hidden layers are 48 to 96 wide now" in " ".join(
        (result.stderr + result.stdout).split()
    )
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == CONFIG


def test_caches_get_the_width_that_the_configuration_says(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama", "decoder.onnx", {"genai_config.json": GENAI_CONFIG})
    options = ("--ratio", 0.5, "--roles", "qk,vo", "--uniform", "--method", "select", "--criterion", "magnitude")
    report = reported("prune", source, *options, "-o", tmp_path / "half")
    model = snpc.load(tmp_path / "half" / "decoder.onnx")
    (width,) = {spec.shape[3] for spec in model.inputs if "past" in spec.name}
    assert report["folder"]["changed"] == {"genai_config.json": [f"head_size 12 -> {width}"]}
    config = json.loads((tmp_path / "half" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["head_size"] == width < 12
    assert config["search"] == GENAI_CONFIG["search"]
    # two layers, keys and values, two heads, float32
    assert report["cache_bytes_per_token"] == {"before": 2 * 2 * 2 * 12 * 4, "after": 2 * 2 * 2 * width * 4}
    kept = snpc.prune_folder(source, tmp_path / "same", ratio=0.5, uniform=True, prune_kv_cache=False, **MAGNITUDE)
    assert kept.model.cache_bytes == (2 * 2 * 2 * 12 * 4,) * 2
    assert not kept.changed
    invoke(
        "prune", source, *options, "--keep-kv-cache", "-o", tmp_path / "other", code=2
    )  # nothing else has these roles


def test_caches_stay_where_no_configuration_says_their_width(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    found = snpc.prune_folder(source, tmp_path / "half", ratio=0.5, **MAGNITUDE)
    assert found.model.cache_bytes[0] == found.model.cache_bytes[1] > 0
    refused = invoke("prune", source / "model.onnx", "--ratio", 0.5, "--keep-kv-cache", code=2)
    assert "--keep-kv-cache is for folders" in refused.stderr


def test_the_default_name_and_folders_for_other_commands(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    result = invoke("prune", source, "--ratio", 0.3, "--method", "select", "--criterion", "magnitude")
    assert (tmp_path / "llama-pruned" / "model.onnx").is_file()
    assert f"folder: {tmp_path / 'llama-pruned'}: " in result.stdout
    assert "cache, bytes per token" in result.stdout
    assert "snpc-" not in result.stdout, "no name of a temporary folder"
    invoke("inspect", tmp_path / "llama-pruned")
    invoke("verify", source, tmp_path / "llama-pruned")


@pytest.mark.parametrize("words", [("--file", "x.onnx")])
def test_a_file_has_no_file_in_it(words: tuple[str, ...], tmp_path: Path) -> None:
    write_decoder(tmp_path / "model.onnx", external=False)
    refused = invoke("prune", tmp_path / "model.onnx", "--ratio", 0.5, *words, code=2)
    assert "--file names a model of a folder" in refused.stderr


def test_a_dry_run_writes_no_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "llama")
    invoke("prune", source, "--ratio", 0.5, "--dry-run", "-o", tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_two_decoders_are_cut_by_one_plan(tmp_path: Path) -> None:
    source = write_pair_folder(tmp_path / "bart")
    before = content(source)
    options = ("--ratio", 0.5, "--uniform", "--prune-kv-cache", "--method", "select", "--criterion", "magnitude")
    report = reported("prune", source, "--file", SECOND, *options, "-o", tmp_path / "half")
    assert content(source) == before
    after = content(tmp_path / "half")
    assert set(after) == {FIRST, SECOND, "encoder_model.onnx", "config.json"}
    assert after["encoder_model.onnx"] == before["encoder_model.onnx"]
    assert all(len(after[name]) < len(before[name]) for name in (FIRST, SECOND))
    assert any(check.startswith(f"{SECOND}: sliced equals masked") for check in report["verify"]["structure"])
    assert json.loads(after["config.json"]) == {**PAIR_CONFIG, "decoder_ffn_dim": HIDDEN_UNITS // 2, "d_kv": 4}
    assert report["folder"]["unsaid"] == {"config.json": ["d_ff stays 32: hidden layers are 16 to 32 wide now"]}
    assert report["folder"]["left_out"] == ["decoder_with_past_model_q4.onnx"]
    # self attention: two layers, keys and values, three heads, float32; caches of the encoder's states do not grow
    assert report["cache_bytes_per_token"] == {"before": 2 * 2 * 3 * 8 * 4, "after": 2 * 2 * 3 * 4 * 4}


def test_companions_of_a_folder_are_found_and_not_given(tmp_path: Path) -> None:
    source = write_pair_folder(tmp_path / "gpt2", cross=False)
    found = snpc.prune_folder(source, tmp_path / "half", ratio=0.5, **MAGNITUDE)
    assert [companion.path for companion in found.model.companions] == [tmp_path / "half" / SECOND]
    with pytest.raises(UserError, match="companions are for files"):
        snpc.prune_folder(source, tmp_path / "other", ratio=0.5, companions=[source / SECOND], **MAGNITUDE)
    refused = invoke("prune", source, "--ratio", 0.5, "--companion", source / SECOND, code=2)
    assert "--companion is for files" in refused.stderr


def test_a_merged_decoder_beside_the_pair_is_cut_with_it(tmp_path: Path) -> None:
    source = write_pair_folder(tmp_path / "bart")
    write_merged(source / MERGED)
    found = snpc.prune_folder(source, tmp_path / "half", file=MERGED, ratio=0.5, uniform=True, **MAGNITUDE)
    assert found.model.path.name == FIRST
    assert sorted(companion.path.name for companion in found.model.companions) == [MERGED, SECOND]
    pair = snpc.load(tmp_path / "half" / FIRST, companions=[tmp_path / "half" / SECOND])
    merged = snpc.load(tmp_path / "half" / MERGED)
    for own, branch in zip((pair, *pair.companions), (merged, *merged.companions), strict=True):
        weights = [
            sorted(tuple(v.shape) for v in model.graph.graph.initializers.values() if v.shape and len(v.shape) == 2)
            for model in (own, branch)
        ]
        assert weights[0] == weights[1] and (24, 16) in weights[0]
        assert sorted(spec.name for spec in own.inputs) == sorted(spec.name for spec in branch.inputs)


def test_configurations_say_how_many_experts_there_are_and_how_wide(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    shutil.copy(export("qwen3moe__ts17"), tmp_path / "moe" / "model.onnx")
    config = {"num_experts": COUNT, "moe_intermediate_size": EXPERT_UNITS, "num_experts_per_tok": CHOSEN}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    written = snpc.prune_folder(
        tmp_path / "moe", tmp_path / "out", ratio=0.5, roles=("ffn", "experts"), uniform=True, method="select"
    )
    assert json.loads((written.path / "config.json").read_text()) == {
        **config,
        "num_experts": COUNT // 2,
        "moe_intermediate_size": EXPERT_UNITS // 2,
    }
