"""What a graph pass is, and how a list of passes is run: data, so that passes can be listed, and watched one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from snpc.errors import UserError

Stage = Literal["canonicalize", "dequantize", "analyze", "rewrite", "finalize", "fuse"]

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


class MalformedGraphError(UserError):
    """A graph that breaks the rules of ONNX: a cycle, a value that two nodes produce. The file is not named."""


def root_cause(error: BaseException) -> BaseException:
    """The first error in a chain: onnx-ir wraps an error once per level of the message, each with the whole content."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def error_summary(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@contextmanager
def malformed_graph_errors() -> Iterator[None]:
    """Around calls of onnx-ir alone: what it refuses is a graph that breaks the rules, a MalformedGraphError.

    It raises ValueError, RuntimeError and errors of passes; anything else is a bug and stays what it is.
    """
    try:
        yield
    except (ValueError, RuntimeError, ir.passes.InvariantError) as error:
        raise MalformedGraphError(f"the graph is malformed ({error_summary(root_cause(error))})") from error


def run_library_pass(library_pass: ir.passes.PassBase, model: ir.Model) -> ir.passes.PassResult:
    """Run a pass of onnx-ir. Raises MalformedGraphError."""
    with malformed_graph_errors():
        return library_pass(model)


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
