"""Folders of exporters that want other packages than the test environment has: run where they are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import snpc

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
VOCABULARY = 64


def save_t5(folder: Path) -> None:
    """A T5 of two layers with random weights, and its configuration."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def t5_data(samples: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = {"input_ids": 9, "decoder_input_ids": 8}
    return {name: rng.integers(1, VOCABULARY, (samples, length)) for name, length in lengths.items()}


def test_optimum_generates_from_the_folder_that_was_cut(tmp_path: Path) -> None:
    exporters = pytest.importorskip("optimum.exporters.onnx")
    runtime = pytest.importorskip("optimum.onnxruntime")
    import torch

    save_t5(tmp_path / "t5")
    exporters.main_export(
        str(tmp_path / "t5"), str(tmp_path / "onnx"), task="text2text-generation-with-past", do_validation=False
    )
    found = snpc.prune_folder(tmp_path / "onnx", tmp_path / "half", ratio=0.5, effort="quick", calibration=t5_data())
    assert found.encoder is not None and found.whole is not None and len(found.whole.checks) == 2
    prompt = torch.tensor([[3, 4, 5, 6, 7]])
    generated = []
    for merged in (True, False):
        model = runtime.ORTModelForSeq2SeqLM.from_pretrained(str(found.path), use_merged=merged, use_io_binding=False)
        mask = torch.ones_like(prompt)
        generated.append(model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=6, min_new_tokens=6))
    assert generated[0].shape == (1, 7) and torch.equal(*generated)


def test_a_folder_of_mobius(tmp_path: Path) -> None:
    mobius = pytest.importorskip("mobius")
    save_t5(tmp_path / "t5")
    mobius.build(str(tmp_path / "t5")).save(str(tmp_path / "onnx"))
    found = snpc.prune_folder(
        tmp_path / "onnx", tmp_path / "half", ratio=0.5, effort="quick", prune_kv_cache=True, calibration=t5_data()
    )
    assert found.encoder is not None and found.whole is not None and found.whole.checks
    before, after = found.model.cache_bytes
    assert after <= 0.6 * before and found.encoder.after.macs < 0.6 * found.encoder.before.macs
