"""The torch bridge: a graph as a module, trained, and its weights handed back to the same graph.

    module = snpc.torch.load("pruned.onnx")
    logits = module(images)
    snpc.torch.save(module, "pruned.onnx", "tuned.onnx")

or, with the dense model as the teacher:

    data = snpc.load_calibration("images.npz", snpc.load("model.onnx").inputs, samples=10_000)
    snpc.torch.finetune(Path("pruned.onnx"), Path("model.onnx"), data, Path("tuned.onnx"))
"""

from __future__ import annotations

from snpc.runtime.statistics.gate_gradients import register_gradient_provider
from snpc.torch.export_safetensors import export_tensors
from snpc.torch.finetune import FinetuneResult, finetune, finetune_json
from snpc.torch.module import GraphModule
from snpc.torch.module import load_graph_module as load
from snpc.torch.pruning.gradients import compute_gate_gradients
from snpc.torch.pruning.learn_masks import MASK_LEARNING_RATE, LearnedPlan, learn_masks
from snpc.torch.pruning.objectives import AccuracyDrop, DriftLimit
from snpc.torch.pruning.round_log import PruningRound
from snpc.torch.pruning.schedule import Rounds, prune_adaptively, prune_in_rounds
from snpc.torch.training.checkpoints import CheckpointOptions
from snpc.torch.training.loop import TrainingHooks, TrainingResult, train
from snpc.torch.training.losses import Batch
from snpc.torch.training.options import TrainingOptions, TrainingProgress
from snpc.torch.write_back import save_graph_module as save

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
    "Rounds",
    "TrainingHooks",
    "TrainingOptions",
    "TrainingProgress",
    "TrainingResult",
    "export_tensors",
    "finetune",
    "finetune_json",
    "learn_masks",
    "load",
    "prune_adaptively",
    "prune_in_rounds",
    "save",
    "train",
]


register_gradient_provider(compute_gate_gradients)
