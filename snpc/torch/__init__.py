"""The torch bridge: a graph as a module, trained, and its weights handed back to the same graph.

module = snpc.torch.load("pruned.onnx")
logits = module(images)
snpc.torch.save(module, "pruned.onnx", "tuned.onnx")
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from snpc.runtime.model_io import load as load_model
from snpc.torch.module import GraphModule
from snpc.torch.write import save

__all__ = ["GraphModule", "load", "save"]


def load(path: str | os.PathLike[str], *, watch: Sequence[str] = ()) -> GraphModule:
    """The model in an ONNX file as a module whose weights train. Raises UserError where it has an operator that cannot
    be run in torch."""
    return GraphModule(load_model(path), watch=watch)
