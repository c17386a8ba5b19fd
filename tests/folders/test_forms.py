"""Commands that make the other precisions of a model."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from snpc.folders.forms import FORMS, conversion_command, form_of
from tests.models.folders import write_decoder


def run(command: str) -> None:
    """As a shell would, by this Python and this snpc."""
    for part in command.split(" && "):
        program, *words = shlex.split(part)
        prefix = [sys.executable] if program == "python" else [sys.executable, "-m", "snpc.cli"]
        subprocess.run([*prefix, *words], check=True, capture_output=True)


def test_a_form_is_known_by_its_name() -> None:
    models = [Path("onnx/model.onnx"), Path("onnx/decoder_model_merged.onnx")]
    assert form_of(Path("onnx/decoder_model_merged_q4f16.onnx"), models) == (models[1], "q4f16")
    assert form_of(Path("model_q4.onnx"), models) is None, "in another folder"
    assert form_of(Path("onnx/model_other.onnx"), models) is None


@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_has_a_command(form: str) -> None:
    model = Path("my models") / "model.onnx"
    command = conversion_command(Path("out"), model.with_stem(f"model_{form}"), [model])
    assert "'out/my models/model.onnx'" in command or "'\"'\"'out/my models/model.onnx'\"'\"'" in command
    assert "{" not in command


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp16", "quantized", "uint8", "q4", "q4f16", "optimized"])
def test_the_command_makes_what_its_name_says(form: str, tmp_path: Path) -> None:
    source, target = Path("model.onnx"), Path(f"model_{form}.onnx")
    write_decoder(tmp_path / source, external=False)
    run(conversion_command(tmp_path, target, [source]))
    ort.InferenceSession(tmp_path / target, providers=["CPUExecutionProvider"])
    weights = {tensor.data_type for tensor in onnx.load(tmp_path / target).graph.initializer}
    expected = {
        "fp16": onnx.TensorProto.FLOAT16,
        "quantized": onnx.TensorProto.INT8,
        "uint8": onnx.TensorProto.UINT8,
        "q4": onnx.TensorProto.UINT8,
        "q4f16": onnx.TensorProto.FLOAT16,
        "optimized": onnx.TensorProto.FLOAT,
    }
    assert expected[form] in weights
