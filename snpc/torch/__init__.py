"""The torch bridge: a graph as a module, trained, and its weights handed back to the same graph.

    module = snpc.torch.load("pruned.onnx")
    logits = module(images)
    snpc.torch.save(module, "pruned.onnx", "tuned.onnx")

or, with the dense model as the teacher:

    data = snpc.load_calibration("images.npz", snpc.load("model.onnx").inputs, samples=10_000)
    snpc.torch.finetune(Path("pruned.onnx"), Path("model.onnx"), data, Path("tuned.onnx"))

Files
  dense_algebra       The dense algebra of closed forms on torch: on a GPU where there is one, else on torch's CPU
                      kernels.
  export_safetensors  Export of a graph's weights as safetensors, with the widths of its layers as JSON.
  finetune            Finetuning: the weights of a pruned model are trained towards the outputs of the dense model that
                      it came from.
  module              An ONNX graph as a torch module: its weights are parameters under their own names, and gradients
                      flow.
  operators/          Torch implementations of ONNX operators, by domain and name.
  pruning/            Pruning with gradients: gates, learned masks, schedules of rounds.
  trainable_weights   Which constants of a graph are trainable weights, and which of those are one weight stored twice
                      (tied).
  training/           Training of graphs in torch: loop, losses, data order, checkpoints, several processes.
  write_back          Writing trained weights back into the graph that they came from: same nodes, same names, other
                      numbers.
"""

from __future__ import annotations

from snpc.runtime.closed_form import register_algebra
from snpc.runtime.statistics import register_gradient_provider
from snpc.torch.dense_algebra import TorchAlgebra
from snpc.torch.export_safetensors import export_tensors
from snpc.torch.finetune import FinetuneResult, finetune, finetune_json
from snpc.torch.module import GraphModule
from snpc.torch.module import load_graph_module as load
from snpc.torch.pruning import (
    MASK_LEARNING_RATE,
    AccuracyDrop,
    DriftLimit,
    LearnedPlan,
    PruningRound,
    Rounds,
    compute_gate_gradients,
    learn_masks,
    prune_adaptively,
    prune_in_rounds,
)
from snpc.torch.training import (
    Batch,
    CheckpointOptions,
    TrainingHooks,
    TrainingOptions,
    TrainingProgress,
    TrainingResult,
    train,
)
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
    "TorchAlgebra",
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
register_algebra("torch", TorchAlgebra)
