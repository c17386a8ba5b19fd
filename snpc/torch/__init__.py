"""The torch bridge: a graph as a module, trained, and its weights handed back to the same graph.

    module = snpc.torch.load_graph_module("pruned.onnx")
    logits = module(images)
    snpc.torch.save_graph_module(module, "pruned.onnx", "tuned.onnx")

or, with the dense model as the teacher:

    data = snpc.load_calibration("images.npz", snpc.load("model.onnx").inputs, samples=10_000)
    snpc.torch.finetune(Path("pruned.onnx"), Path("model.onnx"), data, Path("tuned.onnx"))
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from snpc.runtime.io.load import load as load_model
from snpc.runtime.statistics.gate_gradients import register_gradient_provider
from snpc.torch.export_safetensors import export_tensors
from snpc.torch.finetune import FinetuneResult, finetune, finetune_json
from snpc.torch.module import GraphModule
from snpc.torch.pruning.gradients import compute_gate_gradients
from snpc.torch.pruning.learn_masks import MASK_LEARNING_RATE, LearnedPlan, learn_masks
from snpc.torch.pruning.objectives import AccuracyDrop, DriftLimit
from snpc.torch.pruning.round_log import PruningRound
from snpc.torch.pruning.schedule import UnitSelection, prune_adaptively, prune_in_rounds
from snpc.torch.training.checkpoints import CheckpointOptions
from snpc.torch.training.loop import TrainingResult, train
from snpc.torch.training.losses import Batch
from snpc.torch.training.options import TrainingOptions, TrainingProgress
from snpc.torch.write_back import save_graph_module

__all__ = [
    "MASK_LEARNING_RATE",
    "AccuracyDrop",
    "Batch",
    "CheckpointOptions",
    "DriftLimit",
    "FinetuneResult",
    "GraphModule",
    "LearnedPlan",
    "PruningRound",
    "TrainingOptions",
    "TrainingProgress",
    "TrainingResult",
    "UnitSelection",
    "export_tensors",
    "finetune",
    "finetune_json",
    "learn_masks",
    "load_graph_module",
    "prune_adaptively",
    "prune_in_rounds",
    "save_graph_module",
    "train",
]


register_gradient_provider(compute_gate_gradients)


def load_graph_module(path: str | os.PathLike[str], *, watch: Sequence[str] = ()) -> GraphModule:
    """The model in an ONNX file as a module whose weights train. Raises UserError where it has an operator that cannot
    be run in torch."""
    return GraphModule(load_model(path), watch=watch)
