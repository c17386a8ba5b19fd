"""Model folders: an ONNX model beside its configuration and tokenizer, as runtimes load them.

Files
  forms           Other precisions of a model, which stand beside it under names of their own, and the commands that
                  make them.
  generation      Generation from a written folder: its runtime must make the tokens that its model stands for.
  model_folder    What a folder holds: the model that is cut, its other forms, and everything else.
  output_folder   The folder with the pruned model: written beside its place, and renamed.
  parts           An encoder and the decoder that reads its states: cut one after the other, and checked together.
  prune_folder    The one call: a folder in, a folder out.
  runtime_config  genai_config.json and config.json: widths that changed with the model.
"""

from __future__ import annotations

from snpc.folders.model_folder import ModelFolder, find_model_folder, main_model, single_model_folder
from snpc.folders.output_folder import OutputFolder, PrunedFolder, open_output_folder
from snpc.folders.parts import ModelParts, PrunedParts, WholeVerdict
from snpc.folders.prune_folder import TOKENIZER_ADVICE, check_part_options, prune_folder

__all__ = [
    "TOKENIZER_ADVICE",
    "ModelFolder",
    "ModelParts",
    "OutputFolder",
    "PrunedFolder",
    "PrunedParts",
    "WholeVerdict",
    "check_part_options",
    "find_model_folder",
    "main_model",
    "open_output_folder",
    "prune_folder",
    "single_model_folder",
]
