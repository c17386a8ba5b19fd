"""What a graph pass is, and how a list of passes is run: data, so that passes can be listed, and watched one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

Stage = Literal["canonicalize", "analyze", "rewrite", "finalize", "fuse"]

PassObserver = Callable[[str, ir.Model], None]
"""Called after each pass with its name and the model that it left."""


@dataclass(frozen=True)
class GraphPass:
    """One entry of a pass list.

    ``run``: what runs. For a pass over models alone it makes the ``onnx_ir`` pass; a step of the rewrite is a function
    of the rewrite's state. ``what`` it does and ``why_here`` in the order are one sentence each.
    """

    name: str
    stage: Stage
    run: Callable[..., Any]
    what: str
    why_here: str


def run_pass(
    entry: GraphPass, model: ir.Model, observer: PassObserver | None = None, **options: Any
) -> ir.passes.PassResult:
    """Run one pass over a model. ``options`` go to the pass when it is made, such as facts that are known already."""
    result: ir.passes.PassResult = entry.run(**options)(model)
    if observer is not None:
        observer(entry.name, result.model)
    return result


def run_passes(
    model: ir.Model, passes: Sequence[GraphPass], observer: PassObserver | None = None
) -> ir.passes.PassResult:
    """Run passes in their order, each on what the one before left. ``modified``: whether any of them changed it."""
    modified = False
    for entry in passes:
        result = run_pass(entry, model, observer)
        model, modified = result.model, modified or result.modified
    return ir.passes.PassResult(model, modified)
