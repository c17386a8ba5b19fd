"""Caches of keys and values: graph inputs that are laid in front of what a step makes, and outputs that hand it on.

Nothing goes by names. An input is a cache where, moved at most, it is concatenated with something else, or is the past
of a fused attention; the axis along which it grows is its length. Where asked for, its other axes get labels like those
of a weight, which makes it as narrow as the keys and values that it meets, and the output beside it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph.shapes import Facts, is_float, opset
from snpc.graph.union_find import components
from snpc.ops import lookup
from snpc.ops.attention import FORMS
from snpc.ops.movement import concat_axis
from snpc.ops.spec import Blocked, Labels
from snpc.passes.propagation.labels import Flag, varying
from snpc.passes.propagation.state import Carried, Trace
from snpc.types import IntArray

ADVICE = "a cache: --prune-kv-cache narrows past and present together"
LONGEST = 1 << 20  # what is longer is no cache
ALONE = "no output hands this cache on, so what fills it would not know that it is narrower"


def find_caches(model: ir.Model, facts: Facts) -> dict[ir.Value, int]:
    """Inputs that are caches, and the axis along which they grow."""
    found = {}
    for value in model.graph.inputs:
        shape = facts.shape.get(value)
        if shape is None or len(shape) < 3 or value.is_initializer() or not is_float(value.dtype):
            continue
        for axis in [k for k in range(1, len(shape)) if 1 < shape[k] <= LONGEST]:
            view = [1] * len(shape)
            view[axis] = shape[axis]
            marks = np.arange(shape[axis], dtype=np.int32).reshape(view)
            if grows(model, facts, value, marks):
                found[value] = axis
    return found


def grows(model: ir.Model, facts: Facts, value: ir.Value, marks: Labels) -> bool:
    """Is something laid behind ``value`` along the axis that ``marks`` vary on?"""
    for node in value.consumers():
        spec = lookup(node.domain, node.op_type)
        call = facts.call(node, opset(model, node.domain))
        if spec.kind == "concat" and call.outs[0]:
            if len(node.inputs) == 1:  # moves nothing
                if grows(model, facts, node.outputs[0], marks):
                    return True
            elif varying(marks) == {concat_axis(call)}:
                return True
        elif spec.kind == "attention":
            past = FORMS[node.domain, node.op_type].past
            if varying(marks) == {marks.ndim - 2} and any(
                node.inputs[k] is value for k in past if k < len(node.inputs)
            ):
                return True
        elif spec.kind == "movement" and spec.move is not None and node.inputs[0] is value:
            try:
                moved = spec.move(call, marks)
            except (Blocked, AssertionError):
                continue
            if any(varying(m) and grows(model, facts, out, m) for out, m in zip(node.outputs, moved, strict=False)):
                return True
    return False


def enter_cache(trace: Trace, value: ir.Value, facts: Facts, length: int) -> Carried:
    """Labels on every axis but the length and the batch."""
    shape = facts.shape[value]
    assert shape is not None and value.shape is not None
    fixed = [isinstance(d, int) and k != length and (k > 0 or len(shape) > 4) for k, d in enumerate(value.shape)]
    view = [n if ok else 1 for n, ok in zip(shape, fixed, strict=True)]
    labels = trace.book.fresh(int(np.prod(view))).reshape(view)
    trace.book.flag(labels, Flag.CACHED)
    trace.caches[value] = labels
    return Carried(str(value.name), shape, (labels,) if labels.size > 1 else ())


def handed_on(trace: Trace, outputs: list[ir.Value]) -> Iterator[ir.Value]:
    """Outputs that hold what a cache holds, position for position; a cache without one is pinned."""
    unit = components(trace.book.count, trace.book.pairs)
    for value, labels in trace.caches.items():
        twins = [out for out in outputs if holds(trace.values.get(out), labels, unit)]
        if not twins:
            axes = sorted(varying(labels)) or [0]
            size = labels.shape[axes[0]]
            trace.book.pin(labels, str(value.name), axes[0], size, ALONE, f"input {value.name}")
        yield from twins


def holds(carried: Carried | None, labels: Labels, unit: IntArray) -> bool:
    return carried is not None and any(
        f.shape == labels.shape and bool((unit[f] == unit[labels]).all()) for f in carried.factors
    )


def narrow_interface(model: ir.Model, changes: Mapping[str, Mapping[int, int]]) -> None:
    """Declare the inputs and outputs of a shrunk model at their new sizes."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = changes.get(str(value.name))
        if sizes and value.shape is not None:
            value.shape = ir.Shape([sizes.get(k, d) for k, d in enumerate(value.shape)])
