"""The torch bridge: a graph as a module, trained, and its weights handed back to the same graph.

    module = snpc.torch.load("pruned.onnx")
    logits = module(images)
    snpc.torch.save(module, "pruned.onnx", "tuned.onnx")

or, with the dense model as the teacher:

    data = snpc.load_calibration("images.npz", snpc.load("model.onnx").inputs, samples=10_000)
    snpc.torch.finetune(Path("pruned.onnx"), Path("model.onnx"), data, Path("tuned.onnx"))
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from snpc.runtime.io.load import load as load_model
from snpc.torch.export_safetensors import export_tensors
from snpc.torch.finetune import Tuned, finetune, report
from snpc.torch.module import GraphModule
from snpc.torch.pruning.learn_masks import RATE, Learned, learn_masks
from snpc.torch.pruning.objectives import AccuracyDrop, DriftLimit
from snpc.torch.pruning.round_log import Round
from snpc.torch.pruning.schedule import Way, prune_adaptively, prune_in_rounds
from snpc.torch.training.checkpoints import Saved
from snpc.torch.training.loop import Trained, train
from snpc.torch.training.losses import Batch
from snpc.torch.training.options import Progress, Training
from snpc.torch.write_back import save

__all__ = [
    "RATE",
    "AccuracyDrop",
    "Batch",
    "DriftLimit",
    "GraphModule",
    "Learned",
    "Progress",
    "Round",
    "Saved",
    "Trained",
    "Training",
    "Tuned",
    "Way",
    "export_tensors",
    "finetune",
    "learn_masks",
    "load",
    "prune_adaptively",
    "prune_in_rounds",
    "report",
    "save",
    "train",
]


def load(path: str | os.PathLike[str], *, watch: Sequence[str] = ()) -> GraphModule:
    """The model in an ONNX file as a module whose weights train. Raises UserError where it has an operator that cannot
    be run in torch."""
    return GraphModule(load_model(path), watch=watch)
