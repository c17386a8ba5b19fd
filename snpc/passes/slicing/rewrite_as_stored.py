"""Rewriting for a file: that of a quantized one has the nodes and codes of the file in place of the float ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.graph import PassObserver, static_shape
from snpc.passes.grouping import TracedGraph
from snpc.passes.quantization import CutConstant, cut_constants, write_back
from snpc.passes.slicing.rewrite import RewrittenModel, rewrite_model
from snpc.passes.slicing.slice import Cuts
from snpc.types import IntArray, Model, QuantizedForm


def rewrite_as_stored(
    model: Model, source: TracedGraph, cuts: Cuts, observer: PassObserver | None = None
) -> tuple[RewrittenModel, ir.Model]:
    """(the rewrite of ``source``, the graph to write): the sliced graph itself, or of a quantized file what stands for
    it there, codes that are only sliced bit for bit.

    ``source``: the traced graph of ``model``, or that with refitted weights.
    """
    form = model.quantized
    rewritten = rewrite_model(source, cuts, observer, keep_scales=form is not None)
    if form is None:
        return rewritten, rewritten.model
    keep = rewritten.kept_positions()
    constants = cut_constants(form, model.graph, rewritten.model, keep)
    rounded = {
        name: full_size(form, cut, rewritten.source.model.graph.initializers[name], keep.get(name, {}))
        for name, cut in constants.items()
        if not cut.sliced
    }
    written = write_back(form, model.graph, rewritten.model.clone(), constants)
    return replace(rewritten, rounded=rounded, as_stored=len(constants) - len(rounded)), written


def full_size(form: QuantizedForm, cut: CutConstant, whole: ir.Value, keep: Mapping[int, IntArray]) -> ir.LazyTensor:
    """What a constant stands for after rounding, in the places that it has in ``whole``, before the cut."""
    tensor = whole.const_value
    assert tensor is not None

    def read() -> ir.TensorProtocol:
        contents = np.array(tensor.numpy())
        kept = [keep.get(axis, np.arange(size)) for axis, size in enumerate(contents.shape)]
        contents[np.ix_(*kept)] = cut.floats(form).astype(contents.dtype)
        return ir.Tensor(contents, dtype=tensor.dtype, name=whole.name)

    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(static_shape(tensor)), name=whole.name)
