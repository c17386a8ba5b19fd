"""Model folders as tools write them, around a small decoder with caches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from tests.models import decoder_pairs as pairs
from tests.models.builder_decoders import CONTEXT, VOCABULARY, BuilderDecoder
from tests.oracle import analysis_of

DECODER = "llama_cached__dyn20"
HEAD_WIDTH, HIDDEN = 12, 96  # of the decoder
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "intermediate_size": HIDDEN,
    "head_dim": HEAD_WIDTH,
    "max_position_embeddings": HIDDEN,
}
GENAI_CONFIG: Mapping[str, Any] = {
    "model": {
        "type": "llama",
        "decoder": {"filename": "decoder.onnx", "head_size": HEAD_WIDTH, "num_hidden_layers": 2},
    },
    "search": {"max_length": 64},
}


def write_decoder(path: Path, external: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(analysis_of(DECODER).model.path)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=64)


def write_other_model(path: Path) -> None:
    """A model with other weights."""
    shutil.copy(analysis_of("gpt2_cached__ts14").model.path, path)


PAIR_CONFIG: Mapping[str, Any] = {
    "decoder_ffn_dim": pairs.HIDDEN,
    "encoder_ffn_dim": pairs.HIDDEN,
    "d_ff": pairs.HIDDEN,
    "d_kv": pairs.HEAD_WIDTH,
}


def write_pair_folder(folder: Path, cross: bool = True) -> Path:
    """A decoder in two files with its configuration; with an encoder where the decoder reads its states, and another
    precision of the second file."""
    folder.mkdir()
    for path in pairs.pair_paths(cross):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(PAIR_CONFIG))
    if cross:
        shutil.copy(pairs.encoder_folder().path / pairs.ENCODER, folder)
        shutil.copy(folder / pairs.SECOND, folder / "decoder_with_past_model_q4.onnx")
    return folder


def write_folder(folder: Path, model: str = "model.onnx", configs: Mapping[str, Any] | None = None) -> Path:
    """A decoder, its configurations, a tokenizer, and files of version control."""
    write_decoder(folder / model)
    for name, content in (configs if configs is not None else {"config.json": CONFIG}).items():
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text('{"model": "none"}')
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("main")
    return folder


def write_genai_folder(folder: Path) -> Path:
    """A decoder in the form of onnxruntime-genai's builder, with the configuration that this runtime needs."""
    folder.mkdir()
    decoder = BuilderDecoder()
    decoder.write(folder / "model.onnx")
    names = {f"{kind}_names": f"past_key_values.%d.{kind.split('_')[1]}" for kind in ("past_key", "past_value")}
    presents = {
        name.replace("past", "present"): text.replace("past_key_values", "present") for name, text in names.items()
    }
    config = {
        "model": {
            "bos_token_id": 1,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": 0,
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "type": "llama",
            "decoder": {
                "filename": "model.onnx",
                "head_size": decoder.width,
                "hidden_size": decoder.hidden,
                "num_attention_heads": decoder.heads,
                "num_key_value_heads": decoder.kv_heads,
                "num_hidden_layers": decoder.layers,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
                "outputs": {"logits": "logits", **presents},
            },
        },
        "search": {"max_length": CONTEXT, "past_present_share_buffer": False},
    }
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder
