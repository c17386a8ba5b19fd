"""Models that snpc runs to learn from them: written to a temporary, opened, run, and gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from snpc.ops.names import TYPE_ATTRIBUTES
from snpc.passes.canonicalization.finalize import finalize
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import release_free_memory
from snpc.runtime.execution.session import (
    PROVIDERS,
    MemoryMode,
    OptimizationLevel,
    open_session,
    resolve_provider,
    run_session,
)
from snpc.runtime.io.save import save
from snpc.types import AnyArray, Feeds

RunFunction = Callable[[Feeds], dict[str, AnyArray]]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@contextmanager
def temporary_session(
    model: ir.Model,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    optimise: OptimizationLevel = "all",
    memory: MemoryMode = "lean",
    external: bool = False,
) -> Iterator[RunFunction]:
    """A call from feeds (what the model does not take is left out) to its outputs by name. Takes ``model`` over.

    bfloat16 is run as float32 where onnxruntime has no arithmetic in it; then outputs are float32 too.
    """
    wide = runs_in_float32(model, execution)
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "model.onnx"
        save(widen_bfloat16(finalize(model)) if wide else finalize(model), path, external)
        held = [open_session(path, execution=execution, optimise=optimise, memory=memory)]
        names = {i.name for i in held[0].get_inputs()}

        def run(feeds: Feeds) -> dict[str, AnyArray]:
            mine = {name: array for name, array in feeds.items() if name in names}
            if wide:
                mine = {name: a.astype(np.float32) if a.dtype == BFLOAT16 else a for name, a in mine.items()}
            return run_session(held[0], mine)

        try:
            yield run
        finally:
            held.clear()  # whoever still has ``run`` does not keep the session
            release_free_memory()


# -- bfloat16 --------------------------------------------------------------------------------------------------------


def runs_in_float32(model: ir.Model, execution: Execution) -> bool:
    """Does ``temporary_session`` run this model in float32? onnxruntime's CPU provider has no arithmetic in
    bfloat16."""
    if resolve_provider(execution.provider) != PROVIDERS["cpu"]:
        return False
    values = [*model.graph.initializers.values(), *model.graph.inputs]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def widen_bfloat16(model: ir.Model) -> ir.Model:
    """The model with float32 in place of bfloat16 everywhere; changed in place, weights are converted as they are
    read."""
    for graph in model.graphs():
        nodes = list(graph)
        for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs, *node_outputs(nodes)):
            if value.dtype == ir.DataType.BFLOAT16:
                value.type = ir.TensorType(ir.DataType.FLOAT)  # copies of a graph share the type that was there
            if value.const_value is not None:
                value.const_value = widen_tensor(value.const_value)
        for node in nodes:
            for name, attribute in list(node.attributes.items()):
                found = attribute.value
                if name in TYPE_ATTRIBUTES and found == int(ir.DataType.BFLOAT16):
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                elif isinstance(found, ir.TensorProtocol):
                    node.attributes[name] = ir.AttrTensor(name, widen_tensor(found))
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
