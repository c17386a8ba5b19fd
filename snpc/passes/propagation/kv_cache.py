"""KV caches: past inputs that are concatenated in front of new keys and values, and the present outputs.

Caches are found by structure, not by name. An input is a cache if it is concatenated with another tensor, directly or
after movement, or if it is the past of a fused attention node. The concatenated axis is its length. With
``--prune-kv-cache`` the other axes get labels, as those of a weight do, so that the past, the keys and values of the
step and the present output are narrowed together.

Of two decoders that make one, the first has only present outputs, which become past inputs of the second: caches of the
cross attention are made once, and the second returns none. ``mark_shared_caches`` marks both ends by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph import ShapeFacts, connected_components, find_presents, is_float, opset_version
from snpc.ops import ATTENTION_FORMS, Blocked, Labels, concat_axis, lookup
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.state import LabeledValue, Trace
from snpc.types import IntArray

KV_CACHE_ADVICE = "a KV cache: --prune-kv-cache narrows past inputs and present outputs together"
MAX_CACHE_LENGTH = 1 << 20  # a longer axis is not the length of a cache
SHARED_CACHE_KEY = "snpc.shared_cache"  # mark of values that one decoder hands to another
NO_PRESENT_OUTPUT = "no output returns this cache, so its width is fixed by the caller"


def mark_shared_caches(first: ir.Model, second: ir.Model) -> None:
    """Mark the outputs of ``first`` that are caches of ``second``, and these inputs."""
    outputs = {str(value.name): value for value in first.graph.outputs}
    inputs = {str(value.name): value for value in second.graph.inputs}
    for past, present in find_presents(list(inputs), list(outputs)).items():
        outputs[present].meta[SHARED_CACHE_KEY] = inputs[past].meta[SHARED_CACHE_KEY] = True


def is_shared_cache(value: ir.Value) -> bool:
    return bool(value.meta.get(SHARED_CACHE_KEY, False))


def find_kv_caches(model: ir.Model, facts: ShapeFacts) -> dict[ir.Value, int]:
    """Inputs that are caches, each with the axis of its length."""
    length_axes = {}
    for value in model.graph.inputs:
        shape = facts.shape.get(value)
        if shape is None or len(shape) < 3 or value.is_initializer() or not is_float(value.dtype):
            continue
        for axis in [k for k in range(1, len(shape)) if 1 < shape[k] <= MAX_CACHE_LENGTH]:
            view = [1] * len(shape)
            view[axis] = shape[axis]
            positions = np.arange(shape[axis], dtype=np.int32).reshape(view)
            if is_concatenated_along(model, facts, value, positions) or is_length_of_shared(value, axis):
                length_axes[value] = axis
    return length_axes


def is_length_of_shared(value: ir.Value, axis: int) -> bool:
    """Whether ``axis`` is the dynamic one of a cache that another decoder makes, as that of a cross attention."""
    return is_shared_cache(value) and value.shape is not None and not isinstance(value.shape[axis], int)


def is_concatenated_along(model: ir.Model, facts: ShapeFacts, value: ir.Value, positions: Labels) -> bool:
    """Whether another tensor is concatenated with ``value`` along the axis that ``positions`` vary on."""
    for node in value.consumers():
        spec = lookup(node.domain, node.op_type)
        call = facts.call(node, opset_version(model, node.domain))
        if spec.kind == "concat" and call.out_shapes[0]:
            if len(node.inputs) == 1:  # Concat of one tensor is the identity
                if is_concatenated_along(model, facts, node.outputs[0], positions):
                    return True
            elif varying_axes(positions) == {concat_axis(call)}:
                return True
        elif spec.kind == "attention":
            past = ATTENTION_FORMS[node.domain, node.op_type].past
            if varying_axes(positions) == {positions.ndim - 2} and any(
                node.inputs[k] is value for k in past if k < len(node.inputs)
            ):
                return True
        elif spec.kind == "movement" and spec.move is not None and node.inputs[0] is value:
            try:
                moved = spec.move(call, positions)
            except (Blocked, AssertionError):
                continue
            if any(
                varying_axes(moved_positions) and is_concatenated_along(model, facts, out, moved_positions)
                for out, moved_positions in zip(node.outputs, moved, strict=False)
            ):
                return True
    return False


def label_kv_cache(trace: Trace, value: ir.Value, facts: ShapeFacts, length: int) -> LabeledValue:
    """Label every axis of a cache but its length and batch axes."""
    shape = facts.shape[value]
    assert shape is not None and value.shape is not None
    is_labeled = [isinstance(d, int) and k != length and (k > 0 or len(shape) > 4) for k, d in enumerate(value.shape)]
    view = [n if labeled else 1 for n, labeled in zip(shape, is_labeled, strict=True)]
    labels = trace.table.allocate(int(np.prod(view))).reshape(view)
    made = LabelFlag.PRODUCED if is_shared_cache(value) else LabelFlag(0)  # by a weight of the other decoder
    trace.table.flag(labels, LabelFlag.CACHED | made)
    trace.caches[value] = labels
    return LabeledValue(str(value.name), shape, (labels,) if labels.size > 1 else ())


def present_outputs(trace: Trace, outputs: list[ir.Value]) -> Iterator[ir.Value]:
    """Outputs with the labels of a cache at every position, and those that are caches of another decoder. A cache that
    nobody makes is pinned."""
    unit = connected_components(trace.table.count, trace.table.pairs)
    for value, labels in trace.caches.items():
        presents = [out for out in outputs if has_cache_labels(trace.values.get(out), labels, unit)]
        if not presents and not is_shared_cache(value):
            axes = sorted(varying_axes(labels)) or [0]
            size = labels.shape[axes[0]]
            trace.table.pin(labels, str(value.name), axes[0], size, NO_PRESENT_OUTPUT, f"input {value.name}")
        yield from presents
    for value in outputs:
        if is_shared_cache(value) and value in trace.values:
            for labels in trace.values[value].factors:
                trace.table.flag(labels, LabelFlag.CACHED)
            yield value


def has_cache_labels(labeled_value: LabeledValue | None, labels: Labels, unit: IntArray) -> bool:
    """Whether a value has, at every position, the unit of a cache. Keys and values that were stacked into one tensor
    have the same units, and do not vary along the axis that tells them apart."""
    return labeled_value is not None and any(
        is_broadcastable(f, labels) and bool((unit[f] == unit[labels]).all()) for f in labeled_value.factors
    )


def is_broadcastable(labels: Labels, other: Labels) -> bool:
    """Whether ``labels`` has the shape of ``other``, or 1 where they differ."""
    return labels.ndim == other.ndim and all(n in (1, m) for n, m in zip(labels.shape, other.shape, strict=True))


def resize_interface(model: ir.Model, changes: Mapping[str, Mapping[int, int]]) -> None:
    """Set the declared shapes of inputs and outputs of a sliced model. ``changes``: name -> axis -> new size."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = changes.get(str(value.name))
        if sizes and value.shape is not None:
            value.shape = ir.Shape([sizes.get(k, d) for k, d in enumerate(value.shape)])
