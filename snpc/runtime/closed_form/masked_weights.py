"""Cuts tried without changing a shape: constants with their edits, and zero where units are gone."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import numpy as np
import onnx_ir as ir

from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.slicing.mask import mask_constants, zeroed_positions
from snpc.passes.slicing.slice import Cuts, find_removed_units
from snpc.passes.weights.edits import WeightEdits, existing_bias
from snpc.types import AnyArray, FloatArray


def constant_array(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()


def fold_bias_edits(source: TracedGraph, edits: WeightEdits) -> WeightEdits:
    """The edits with what goes into biases as changes of the constants that are added there already; a bias that would
    need a new node is left out."""
    nodes = {n.name: n for n in source.model.graph}
    changes = {name: list(todo) for name, todo in edits.changes.items()}
    for node, vector in edits.biases.items():
        bias = existing_bias(nodes[node], len(vector))
        if bias is not None:
            changes.setdefault(str(bias.name), []).append(add_vector(vector))
    return WeightEdits(changes)


def add_vector(vector: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda array: array + vector.reshape(array.shape)


def edited_constants(
    source: TracedGraph, edits: WeightEdits, held: Mapping[str, AnyArray] | None = None
) -> dict[str, AnyArray]:
    """New contents, by name, of the constants that edits change, in their own types; ``held``: contents of those that
    have been changed before."""
    found: dict[str, AnyArray] = {}
    for name, changes in fold_bias_edits(source, edits).changes.items():
        before = (held or {}).get(name)
        if before is None:
            before = constant_array(source.model.graph.initializers[name])
        array = before.astype(np.float64)
        for change in changes:
            array = change(array)
        found[name] = array.astype(before.dtype)
    return found


def trial_weights(
    source: TracedGraph, held: Mapping[str, AnyArray], cuts: Cuts, names: Container[str] | None = None
) -> dict[str, AnyArray]:
    """Contents, by name, of the constants (of ``names``, where given) of which ``held`` has new ones or that ``cuts``
    make silent."""
    dead = find_removed_units(source.trace, source.units, cuts)
    kept = {name: array for name, array in held.items() if names is None or name in names}
    return kept | mask_constants(source.trace, dead, held, names)


def changed_constants(source: TracedGraph, edits: WeightEdits, cuts: Cuts) -> frozenset[str]:
    """Names of the constants that edits change or cuts make silent."""
    dead = find_removed_units(source.trace, source.units, cuts)
    return frozenset(fold_bias_edits(source, edits).changes).union(n for n, *_ in zeroed_positions(source.trace, dead))
