"""Other precisions of a model, which stand beside it under names of their own, and the commands that make them.

Weights of a pruned model are fitted, so a form of the dense model is not cut: it is made of the pruned model again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

BLOCKS_OF_32 = (
    "python -m onnxruntime.quantization.matmul_nbits_quantizer --input_model {model} --output_model {form} --bits 4 "
    "--block_size 32"
)
HALF_PRECISION = (
    "import onnx; from onnxruntime.transformers.float16 import convert_float_to_float16; "
    "onnx.save(convert_float_to_float16(onnx.load({model!r}), keep_io_types=True), {form!r})"
)
DYNAMIC = (
    "from onnxruntime.quantization import quantize_dynamic, QuantType; "
    "quantize_dynamic({model!r}, {form!r}, weight_type=QuantType.{type}, extra_options=dict(EnableSubgraph=True))"
)
BUILD = "snpc build {model} --target ort -o {form}"
NF4 = "python -m onnxruntime.quantization.matmul_bnb4_quantizer --input_model {model} --output_model {form}"

FORMS: Mapping[str, tuple[str, ...]] = {
    "fp16": (HALF_PRECISION,),
    "bf16": (f"{BUILD} --precision bf16",),
    "int8": (DYNAMIC.replace("{type}", "QInt8"),),
    "q8": (DYNAMIC.replace("{type}", "QInt8"),),
    "quantized": (DYNAMIC.replace("{type}", "QInt8"),),
    "uint8": (DYNAMIC.replace("{type}", "QUInt8"),),
    "q4": (BLOCKS_OF_32,),
    "int4": (BLOCKS_OF_32,),
    "q4f16": (BLOCKS_OF_32, HALF_PRECISION.replace("{model!r}", "{form!r}")),
    "bnb4": (NF4,),
    "optimized": (BUILD,),
}
"""Endings of the names of a model's other forms, ``model_q4.onnx`` beside ``model.onnx``: the commands, or Python code,
that make one of a float model."""


def form_of(model: Path, others: Sequence[Path]) -> tuple[Path, str] | None:
    """(the model of ``others`` of which ``model`` is another form, the ending of its name); None of any other model."""
    for other in others:
        for form in FORMS:
            if model.parent == other.parent and model.stem == f"{other.stem}_{form}":
                return other, form
    return None


def conversion_command(folder: Path, form: Path, models: Sequence[Path]) -> str:
    """The command that makes ``form``, a path in ``folder``, of one of its ``models``."""
    found = form_of(form, models)
    assert found is not None
    model, ending = found
    names = {"model": str(folder / model), "form": str(folder / form)}
    quoted = {key: shlex.quote(name) for key, name in names.items()}
    return " && ".join(
        text.format(**quoted) if text.startswith(("python ", "snpc ")) else python_command(text.format(**names))
        for text in FORMS[ending]
    )


def python_command(code: str) -> str:
    return f"python -c {shlex.quote(code)}"
