"""Build targets: optimized graphs and engines for a runtime, built, loaded again and compared.

A target is one file with one ``BuildTarget`` value, listed in ``build.TARGETS``.

Files
  base              Build targets: what one is, requests for a build, and its result.
  build             Building artifacts: cast or quantize a model, build it for a target, load the result and compare its
                    outputs.
  cast              Casting a model to fp16 or bf16, with float32 inputs and outputs; int8 goes to ``quantize``.
  dequantize        The float model of a quantized file, written and compared with it.
  engines/          Engines of TensorRT and TensorRT for RTX: built here, or by a script on another machine.
  genai             onnxruntime-genai, where it is installed: the tokens that it generates from a folder.
  onnxruntime       Build target onnxruntime: the graph after its own optimizations, with further fusions where they are
                    faster.
  openvino          Build target OpenVINO: an IR (.xml and .bin).
  precisions        A model in other precisions, in the forms that transformers.js and optimum know by the ending of
                    their names.
  preferred_widths  Widths at which a runtime is fast, for ``--round-to auto``.
  quantize          Quantization to int8: weights and the activations they multiply, as QuantizeLinear and
                    DequantizeLinear nodes.
  restrict          A model that says less: some entries of the vocabulary, logits of the last position. Written,
                    compared, loaded.
"""

from __future__ import annotations

from snpc.targets.base import BuildOptions, BuildResult
from snpc.targets.build import TARGETS, build, check_build, find_target, timed_artifact
from snpc.targets.dequantize import dequantize
from snpc.targets.genai import generate_tokens, has_genai
from snpc.targets.precisions import (
    FULL_PRECISION,
    PRECISION_FORMS,
    WrittenPrecision,
    check_precisions,
    write_precisions,
)
from snpc.targets.preferred_widths import PreferredWidths, slower_decoding_text, widths_for_target
from snpc.targets.restrict import kept_vocabulary, restrict, vocabulary_path, write_vocabulary

__all__ = [
    "FULL_PRECISION",
    "PRECISION_FORMS",
    "TARGETS",
    "BuildOptions",
    "BuildResult",
    "PreferredWidths",
    "WrittenPrecision",
    "build",
    "check_build",
    "check_precisions",
    "dequantize",
    "find_target",
    "generate_tokens",
    "has_genai",
    "kept_vocabulary",
    "restrict",
    "slower_decoding_text",
    "timed_artifact",
    "vocabulary_path",
    "widths_for_target",
    "write_precisions",
    "write_vocabulary",
]
