"""Trial weights: edits applied and removed units zeroed; shapes unchanged."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import numpy as np
import onnx_ir as ir

from snpc.passes.grouping import TracedGraph
from snpc.passes.slicing import Cuts, find_removed_units, mask_constants, unit_weights, zeroed_positions
from snpc.passes.weights import WeightEdits, existing_bias
from snpc.types import AnyArray, FloatArray


def constant_array(value: ir.Value) -> AnyArray:
    """The contents of a constant."""
    assert value.const_value is not None
    return value.const_value.numpy()


def fold_bias_edits(source: TracedGraph, edits: WeightEdits) -> WeightEdits:
    """The edits with additions to biases as changes of the constants that are added there already. A bias that would
    need a new node is left out."""
    nodes = {node.name: node for node in source.model.graph}
    changes = {name: list(functions) for name, functions in edits.changes.items()}
    for node_name, vector in edits.biases.items():
        bias = existing_bias(nodes[node_name], len(vector))
        if bias is not None:
            changes.setdefault(str(bias.name), []).append(add_vector(vector))
    return WeightEdits(changes)


def add_vector(vector: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda array: array + vector.reshape(array.shape)


def edited_constants(
    source: TracedGraph, edits: WeightEdits, earlier: Mapping[str, AnyArray] | None = None
) -> dict[str, AnyArray]:
    """New contents, by name and in their own types, of the constants that edits change; ``earlier``: the contents of
    those that were changed before."""
    contents: dict[str, AnyArray] = {}
    for name, changes in fold_bias_edits(source, edits).changes.items():
        before = (earlier or {}).get(name)
        if before is None:
            before = constant_array(source.model.graph.initializers[name])
        array = before.astype(np.float64)
        for change in changes:
            array = change(array)
        contents[name] = array.astype(before.dtype)
    return contents


def trial_weights(
    source: TracedGraph, edited: Mapping[str, AnyArray], cuts: Cuts, names: Container[str] | None = None
) -> dict[str, AnyArray]:
    """Contents, by name, of the constants that are ``edited`` or that ``cuts`` remove units of, with removed units
    zeroed, and of the weights of statistics over them (``weigh_statistics``); ``names``: only these constants."""
    removed = find_removed_units(source.trace, source.units, cuts)
    changed = {**edited, **unit_weights(source.trace, removed)}
    selected = {name: array for name, array in changed.items() if names is None or name in names}
    return selected | mask_constants(source.trace, removed, edited, names)


def changed_constants(source: TracedGraph, edits: WeightEdits, cuts: Cuts) -> frozenset[str]:
    """Names of the constants that edits change or cuts zero units of, and of the weights of statistics over these."""
    removed = find_removed_units(source.trace, source.units, cuts)
    zeroed = {name for name, *_ in zeroed_positions(source.trace, removed)}
    return frozenset(fold_bias_edits(source, edits).changes) | zeroed | frozenset(unit_weights(source.trace, removed))
