"""Sessions as functions: of models in memory, written to a temporary file, run, and deleted; and of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from snpc.ops import TYPE_ATTRIBUTES
from snpc.passes.canonicalization import finalize
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import release_free_memory
from snpc.runtime.execution.session import (
    MemoryMode,
    OptimizationLevel,
    open_session,
    run_session,
)
from snpc.runtime.io import read_model, save
from snpc.temporary import temporary_folder
from snpc.types import AnyArray, Feeds

RunFunction = Callable[[Feeds], dict[str, AnyArray]]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@contextmanager
def temporary_session(
    model: ir.Model,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    optimization: OptimizationLevel = "all",
    memory: MemoryMode = "lean",
    external: bool = False,
) -> Iterator[RunFunction]:
    """A function from feeds to outputs by name; feeds that are no inputs are ignored. ``model`` must not be used again.

    bfloat16 runs as float32, and the outputs are then float32 too: see ``runs_in_float32``.
    """
    with temporary_folder() as folder:
        path = folder / "model.onnx"
        save_runnable(model, path, external)
        runs = [open_run(path, execution=execution, optimization=optimization, memory=memory)]
        try:
            yield lambda feeds: runs[0](feeds)
        finally:
            runs.clear()  # a caller that keeps the function does not keep the session
            release_free_memory()


def save_runnable(model: ir.Model, path: Path, external: bool = False) -> None:
    """Write a model to ``path`` as any provider can run it; see ``temporary_session``. ``model`` must not be used
    again."""
    save(widen_bfloat16(finalize(model)) if runs_in_float32(model) else finalize(model), path, external)


def open_run(
    path: Path,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    optimization: OptimizationLevel = "all",
    memory: MemoryMode = "lean",
) -> RunFunction:
    """A function from feeds to outputs of a file that ``save_runnable`` wrote, with a session of its own; feeds that
    are no inputs are ignored."""
    session = open_session(path, execution=execution, optimization=optimization, memory=memory)
    in_float32 = {i.name: i.type == "tensor(float)" for i in session.get_inputs()}

    def run(feeds: Feeds) -> dict[str, AnyArray]:
        return run_session(
            session,
            {
                name: array.astype(np.float32) if in_float32[name] and array.dtype == BFLOAT16 else array
                for name, array in feeds.items()
                if name in in_float32
            },
        )

    return run


@contextmanager
def file_session(
    path: Path, execution: Execution = DEFAULT_EXECUTION, model: ir.Model | None = None
) -> Iterator[RunFunction]:
    """A function from feeds to outputs of the model in ``path``, for few runs; see ``temporary_session``. ``model``:
    what the file holds, where it was read."""
    model = model or read_model(path)
    if runs_in_float32(model):
        with temporary_session(model, execution=execution, optimization="basic", memory="least") as run:
            yield run
        return
    sessions = [open_session(path, execution=execution, optimization="basic", memory="least")]
    names = {i.name for i in sessions[0].get_inputs()}
    try:
        yield lambda feeds: run_session(
            sessions[0], {name: array for name, array in feeds.items() if name in names}, name=path.name
        )
    finally:
        sessions.clear()
        release_free_memory()


# -- bfloat16 --------------------------------------------------------------------------------------------------------


def runs_in_float32(model: ir.Model) -> bool:
    """Whether ``temporary_session`` runs this model in float32: onnxruntime's CPU provider has no arithmetic in
    bfloat16, and it runs what another provider has no kernel for."""
    values = [*model.graph.initializers.values(), *model.graph.inputs]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def widen_bfloat16(model: ir.Model) -> ir.Model:
    """Replace bfloat16 by float32 everywhere, in place; weights are converted when they are read."""
    for graph in model.graphs():
        nodes = list(graph)
        for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs, *node_outputs(nodes)):
            if value.dtype == ir.DataType.BFLOAT16:
                value.type = ir.TensorType(ir.DataType.FLOAT)  # copies of a graph share the type that was there
            if value.const_value is not None:
                value.const_value = widen_tensor(value.const_value)
        for node in nodes:
            for name, attribute in list(node.attributes.items()):
                content = attribute.value
                if name in TYPE_ATTRIBUTES and content == int(ir.DataType.BFLOAT16):
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                elif isinstance(content, ir.TensorProtocol):
                    node.attributes[name] = ir.AttrTensor(name, widen_tensor(content))
    return model


def node_outputs(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    for node in nodes:
        yield from node.outputs


def widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name)  # type: ignore[arg-type]
