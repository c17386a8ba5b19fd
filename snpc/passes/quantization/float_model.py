"""The float graph that a quantized file stands for, as it is analyzed: in memory, its weights computed when read."""

from __future__ import annotations

from dataclasses import replace

from snpc.graph import PassObserver, run_pass
from snpc.passes.canonicalization import FORK_SHARED_CONSTANTS
from snpc.passes.quantization.dequantize import is_written_back, make_float
from snpc.passes.quantization.float_values import FloatValues
from snpc.passes.quantization.moved_constants import fold_moved_constants
from snpc.types import Model


def with_float_graph(model: Model, observer: PassObserver | None = None) -> Model:
    """``model`` with the float graph in place of the file's, as far as pruned models can be written quantized again.

    The file's graph is ``Model.quantized``. The same model where nothing in it is quantized. ``observer`` is called
    after the last step.
    """
    if model.quantized is not None or not any(is_written_back(node) for node in model.graph.graph):
        return model
    graph = model.graph.clone()
    fold_moved_constants(graph)
    stored = graph.clone()
    values = FloatValues(graph.graph)
    if not make_float(graph, values, is_written_back):
        return model
    form = values.record.form(stored)
    run_pass(FORK_SHARED_CONSTANTS, graph, observer)
    return replace(model, graph=graph, quantized=form)
