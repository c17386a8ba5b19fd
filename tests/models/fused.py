"""Exports with attention in one node, as tools of onnxruntime write them."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest


def fuse_attention_of(model: bytes, name: str, folder: Path, head_size: int) -> onnx.ModelProto:
    """The model after onnxruntime.transformers.optimizer, which is told the width of all query heads together."""
    pytest.importorskip("sympy")  # its symbolic shape inference
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path = folder / "model.onnx"
    path.write_bytes(model)
    kind = name.partition("_")[0].replace("albert", "bert")
    heads = 3 if "timm" in name else 4
    logging.disable(logging.WARNING)
    try:
        fused: onnx.ModelProto = optimizer.optimize_model(
            str(path), model_type=kind, num_heads=heads, hidden_size=heads * head_size, opt_level=0
        ).model
    finally:
        logging.disable(logging.NOTSET)
    return fused
