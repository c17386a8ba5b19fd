"""The oracle's other side: the original, at its full size, with the removed units silenced.

A unit is silent when nothing reads it: the rows of the weights that consume it are zero. Units that only meet other
activations (Q and K) are silent when their projection is zero on both sides.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.passes.labels import Axis, Flag
from snpc.passes.pack import Dead
from snpc.passes.trace import Trace

Mask = npt.NDArray[np.bool_]


def removed_positions(trace: Trace, dead: Dead) -> list[tuple[Axis, Mask]]:
    """Every constant axis that loses something, with the positions it loses."""
    found = []
    for axis in trace.book.axes:
        gone = dead.units[dead.unit[axis.first : axis.first + axis.size]]
        if gone.any():
            found.append((axis, gone))
    return found


def mask_constants(trace: Trace, dead: Dead) -> dict[str, npt.NDArray[np.generic]]:
    """New contents, by name, of the constants that must change for the removed units to be silent."""
    flags = trace.book.flags
    read = np.zeros(trace.book.count, bool)
    for axis, gone in removed_positions(trace, dead):
        if flags[axis.first] & Flag.READS:
            read[dead.unit[axis.first : axis.first + axis.size][gone]] = True
    changed: dict[str, npt.NDArray[np.generic]] = {}
    for axis, gone in removed_positions(trace, dead):
        units = dead.unit[axis.first : axis.first + axis.size]
        consumed = bool(flags[axis.first] & Flag.READS)
        silence = gone if consumed else gone & ~read[units]
        if silence.any():
            name = str(axis.constant.name)
            array = changed.get(name)
            if array is None:
                tensor = axis.constant.const_value
                assert tensor is not None
                array = np.array(tensor.numpy())
            index: list[slice | npt.NDArray[np.bool_]] = [slice(None)] * array.ndim
            index[axis.axis] = silence
            array[tuple(index)] = 0
            changed[name] = array
    return changed


def mask_model(model: ir.Model, trace: Trace, dead: Dead) -> ir.Model:
    """A copy of ``model`` with the removed units silenced; shapes stay."""
    copy = model.clone()
    for name, array in mask_constants(trace, dead).items():
        value = copy.graph.initializers[name]
        dtype = value.const_value.dtype if value.const_value is not None else None
        value.const_value = ir.Tensor(array, dtype=dtype, name=name)
    return copy
