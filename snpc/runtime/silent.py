"""Cuts tried without changing a shape: constants with their edits, and zero where units are gone."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from snpc.passes.edit import Edits, existing_bias
from snpc.passes.mask import may_be_zero, removed_positions
from snpc.passes.rewrite import Traced
from snpc.passes.slice import Cuts, dead_units
from snpc.types import AnyArray, FloatArray


def constant_array(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()


def biases_as_changes(source: Traced, edits: Edits) -> Edits:
    """The edits with what goes into biases as changes of the constants that are added there already; a bias that would
    need a new node is left out."""
    nodes = {n.name: n for n in source.model.graph}
    changes = {name: list(todo) for name, todo in edits.changes.items()}
    for node, vector in edits.biases.items():
        bias = existing_bias(nodes[node], len(vector))
        if bias is not None:
            changes.setdefault(str(bias.name), []).append(shift(vector))
    return Edits(changes)


def shift(vector: FloatArray) -> Callable[[FloatArray], FloatArray]:
    return lambda array: array + vector.reshape(array.shape)


def silent_constants(
    source: Traced, edits: Edits, cuts: Cuts, names: Collection[str] | None = None
) -> dict[str, AnyArray]:
    """New contents, by name, of the constants (of ``names``, where given) that edits and cuts change."""
    graph = source.model.graph
    found: dict[str, AnyArray] = {}
    for name, changes in biases_as_changes(source, edits).changes.items():
        if names is None or name in names:
            array = constant_array(graph.initializers[name]).astype(np.float64)
            for change in changes:
                array = change(array)
            found[name] = array
    dead = dead_units(source.trace, source.units, cuts)
    for axis, gone in removed_positions(source.trace, dead):
        name = str(axis.constant.name)
        if (names is None or name in names) and may_be_zero(axis, source.trace):
            array = found.setdefault(name, np.array(constant_array(axis.constant)))
            np.moveaxis(array, axis.axis, 0)[gone] = 0
    return {name: array.astype(constant_array(graph.initializers[name]).dtype) for name, array in found.items()}
