"""Quantized files in, quantized files out: a cut of the float graph is written with the nodes and codes of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from snpc.graph import PassObserver
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph
from snpc.passes.quantization import CutConstant, cut_constants, write_back
from snpc.passes.slicing import Cuts, RewrittenModel, rewrite_model
from snpc.types import AnyArray, IntArray, QuantizedForm


def rewrite_as_stored(
    analysis: Analysis, source: TracedGraph, cuts: Cuts, observer: PassObserver | None = None
) -> tuple[RewrittenModel, ir.Model]:
    """(the rewrite of ``source``, the graph to write): the sliced graph itself, or of a quantized file what stands for
    it. ``source``: that of the analysis, or one with refitted weights."""
    form = analysis.model.quantized
    rewritten = rewrite_model(source, cuts, observer, keep_scales=form is not None)
    return (rewritten, rewritten.model) if form is None else quantize_again(analysis.model.graph, form, rewritten)


def quantize_again(
    whole: ir.Model, form: QuantizedForm, rewritten: RewrittenModel
) -> tuple[RewrittenModel, ir.Model]:
    """(the cut of the float graph ``whole``, with what rounding makes of its constants; the same as a quantized
    graph)."""
    keep = rewritten.kept_positions()
    constants = cut_constants(form, rewritten.model, keep)
    rounded = {
        name: full_size(rewritten, name, cut, keep.get(name, {})) for name, cut in constants.items() if not cut.sliced
    }
    written = write_back(form, whole, rewritten.model.clone(), constants)
    return replace(rewritten, rounded=rounded), written


def full_size(rewritten: RewrittenModel, name: str, cut: CutConstant, keep: Mapping[int, IntArray]) -> AnyArray:
    """What a constant stands for after rounding, in the places that it has before the cut."""
    tensor = rewritten.source.model.graph.initializers[name].const_value
    assert tensor is not None
    whole = np.array(tensor.numpy())
    kept = [keep.get(axis, np.arange(size)) for axis, size in enumerate(whole.shape)]
    whole[np.ix_(*kept)] = cut.array.dequantize().astype(whole.dtype)
    return whole
