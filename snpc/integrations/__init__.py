"""Plug-ins for the tools that a model passes through: pruning as one step of theirs.

    from snpc.integrations import SnpcPrune

Each needs the package that it plugs into, and is imported when it is first used.

Files
  mlflow          Runs of MLflow: what a sweep or a finetuning was asked, what came of it, and its files.
  olive           A surgeon of Olive that prunes the model, as one surgery of its pass GraphSurgeries.
  polygraphy      A loader of Polygraphy that prunes the model of another loader.
  polygraphy_run  A runner for ``polygraphy run``: the pruned model in onnxruntime, beside the original in any other
                  runner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from snpc.integrations.mlflow import TrackedRun, tracked_run
    from snpc.integrations.olive import SnpcSurgeon
    from snpc.integrations.polygraphy import SnpcPrune

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={"mlflow": ["TrackedRun", "tracked_run"], "olive": ["SnpcSurgeon"], "polygraphy": ["SnpcPrune"]},
)
__all__ = ["SnpcPrune", "SnpcSurgeon", "TrackedRun", "tracked_run"]
