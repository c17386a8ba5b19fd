"""Caches of keys and values: graph inputs that are laid in front of what a step makes, and outputs that hand it on.

Nothing goes by names. An input is a cache where, moved at most, it is concatenated with something else, or is the past
of a fused attention; the axis along which it grows is its length. Where asked for, its other axes get labels like those
of a weight, which makes it as narrow as the keys and values that it meets, and the output beside it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import ShapeFacts, is_float, opset_version
from snpc.graph.union_find import connected_components
from snpc.ops import lookup
from snpc.ops.attention import ATTENTION_FORMS
from snpc.ops.movement import concat_axis
from snpc.ops.spec import Blocked, Labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.state import LabeledValue, Trace
from snpc.types import IntArray

KV_CACHE_ADVICE = "a cache: --prune-kv-cache narrows past and present together"
MAX_CACHE_LENGTH = 1 << 20  # what is longer is no cache
NO_PRESENT_OUTPUT = "no output hands this cache on, so what fills it would not know that it is narrower"


def find_kv_caches(model: ir.Model, facts: ShapeFacts) -> dict[ir.Value, int]:
    """Inputs that are caches, and the axis along which they grow."""
    found = {}
    for value in model.graph.inputs:
        shape = facts.shape.get(value)
        if shape is None or len(shape) < 3 or value.is_initializer() or not is_float(value.dtype):
            continue
        for axis in [k for k in range(1, len(shape)) if 1 < shape[k] <= MAX_CACHE_LENGTH]:
            view = [1] * len(shape)
            view[axis] = shape[axis]
            marks = np.arange(shape[axis], dtype=np.int32).reshape(view)
            if is_concatenated_along(model, facts, value, marks):
                found[value] = axis
    return found


def is_concatenated_along(model: ir.Model, facts: ShapeFacts, value: ir.Value, marks: Labels) -> bool:
    """Is something laid behind ``value`` along the axis that ``marks`` vary on?"""
    for node in value.consumers():
        spec = lookup(node.domain, node.op_type)
        call = facts.call(node, opset_version(model, node.domain))
        if spec.kind == "concat" and call.out_shapes[0]:
            if len(node.inputs) == 1:  # moves nothing
                if is_concatenated_along(model, facts, node.outputs[0], marks):
                    return True
            elif varying_axes(marks) == {concat_axis(call)}:
                return True
        elif spec.kind == "attention":
            past = ATTENTION_FORMS[node.domain, node.op_type].past
            if varying_axes(marks) == {marks.ndim - 2} and any(
                node.inputs[k] is value for k in past if k < len(node.inputs)
            ):
                return True
        elif spec.kind == "movement" and spec.move is not None and node.inputs[0] is value:
            try:
                moved = spec.move(call, marks)
            except (Blocked, AssertionError):
                continue
            if any(
                varying_axes(m) and is_concatenated_along(model, facts, out, m)
                for out, m in zip(node.outputs, moved, strict=False)
            ):
                return True
    return False


def label_kv_cache(trace: Trace, value: ir.Value, facts: ShapeFacts, length: int) -> LabeledValue:
    """Labels on every axis but the length and the batch."""
    shape = facts.shape[value]
    assert shape is not None and value.shape is not None
    fixed = [isinstance(d, int) and k != length and (k > 0 or len(shape) > 4) for k, d in enumerate(value.shape)]
    view = [n if ok else 1 for n, ok in zip(shape, fixed, strict=True)]
    labels = trace.table.allocate(int(np.prod(view))).reshape(view)
    trace.table.flag(labels, LabelFlag.CACHED)
    trace.caches[value] = labels
    return LabeledValue(str(value.name), shape, (labels,) if labels.size > 1 else ())


def present_outputs(trace: Trace, outputs: list[ir.Value]) -> Iterator[ir.Value]:
    """Outputs that hold what a cache holds, position for position; a cache without one is pinned."""
    unit = connected_components(trace.table.count, trace.table.pairs)
    for value, labels in trace.caches.items():
        twins = [out for out in outputs if has_cache_labels(trace.values.get(out), labels, unit)]
        if not twins:
            axes = sorted(varying_axes(labels)) or [0]
            size = labels.shape[axes[0]]
            trace.table.pin(labels, str(value.name), axes[0], size, NO_PRESENT_OUTPUT, f"input {value.name}")
        yield from twins


def has_cache_labels(carried: LabeledValue | None, labels: Labels, unit: IntArray) -> bool:
    return carried is not None and any(
        f.shape == labels.shape and bool((unit[f] == unit[labels]).all()) for f in carried.factors
    )


def resize_interface(model: ir.Model, changes: Mapping[str, Mapping[int, int]]) -> None:
    """Declare the inputs and outputs of a shrunk model at their new sizes."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = changes.get(str(value.name))
        if sizes and value.shape is not None:
            value.shape = ir.Shape([sizes.get(k, d) for k, d in enumerate(value.shape)])
