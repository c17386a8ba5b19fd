"""What a quantized file holds once its float constants are cut: codes as they are, or quantized anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.ops import QuantizedArray, read_stored, write_stored
from snpc.passes.canonicalization import original_name
from snpc.passes.quantization.float_values import stored
from snpc.types import AnyArray, IntArray, QuantizedForm, StoredConstant

Keep = Mapping[int, IntArray]
"""Axis -> positions that stay, of the axes that are cut."""


@dataclass(frozen=True)
class CutConstant:
    """A constant after the cut. ``before``: what the file holds; ``array``: what it holds then. ``sliced``: its codes
    and scales are among those of before."""

    constant: StoredConstant
    before: Mapping[str, AnyArray]
    array: QuantizedArray
    sliced: bool

    @cached_property
    def parts(self) -> dict[str, AnyArray]:
        """Part -> what is written. Raises CheckFailed where entries do not fill bytes."""
        stored_constant = self.constant
        parts = write_stored(stored_constant.layout, self.array, self.before, stored_constant.attributes)
        if stored_constant.layout == "table":
            again = read_stored("table", parts, stored_constant.attributes, 0, 0)
            if again.codes.shape != self.array.codes.shape:
                raise CheckFailed(
                    f"{stored_constant.parts['codes']}: {self.array.codes.shape[-1]} columns do not fill bytes; try "
                    "--round-to 2, or --dequantize"
                )
        return parts


def cut_constants(form: QuantizedForm, model: ir.Model, keep: Mapping[str, Keep]) -> dict[str, CutConstant]:
    """Float constant of the rewritten ``model`` -> what the quantized file holds for it.

    ``keep``: by constant, what stays of those that are cut. Codes are cut as they are wherever they then stand for the
    constant exactly; else, as where weights were refitted or a cut goes through blocks that share a scale, they are
    quantized anew in the same scheme.
    """
    found = {
        name: (value, form.constants[original_name(value)])
        for name, value in model.graph.initializers.items()
        if original_name(value) in form.constants
    }
    cut: dict[str, CutConstant] = {}
    for name, (value, constant) in sorted(found.items(), key=lambda entry: shares_scale(form, entry[1][1])):
        tensor = value.const_value
        assert tensor is not None
        before = {part: stored_array(form, initializer) for part, initializer in constant.parts.items()}
        whole = read_stored(constant.layout, before, constant.attributes, constant.axis, constant.block)
        cut[name] = cut_array(
            CutConstant(constant, before, whole, True), tensor.numpy(), keep.get(name, {}), weight_of(value, cut)
        )
    return cut


def shares_scale(form: QuantizedForm, constant: StoredConstant) -> bool:
    """Whether a constant has the scale of a weight, which has to be known first."""
    return constant.layout == "bias" or stored_array(form, constant.parts["codes"]).dtype == np.int32


def stored_array(form: QuantizedForm, name: str) -> AnyArray:
    tensor = stored(form.graph.graph.initializers[name])
    assert tensor is not None
    return np.asarray(tensor.numpy())


def cut_array(whole: CutConstant, wanted: AnyArray, keep: Keep, weight: CutConstant | None) -> CutConstant:
    """``wanted`` as the cut of ``whole``. ``weight``: the one whose scale a bias shares."""
    taken = whole.array.take(keep)
    bias = whole.before["codes"].dtype == np.int32
    moved = bias and weight is not None and not weight.sliced
    if not moved and np.array_equal(taken.dequantize().astype(wanted.dtype), wanted):
        return replace(whole, array=taken)
    scale = bias_scale(taken.scale, weight, keep) if bias else None
    return replace(whole, array=taken.quantize(wanted, scale), sliced=False)


def bias_scale(own: AnyArray, weight: CutConstant | None, keep: Keep) -> AnyArray:
    """The scale of a bias, which is that of its weight times that of the input: it changes as the weight's does."""
    if weight is None or weight.sliced:
        return own
    old, new = (part["scale"].astype(np.float32).reshape(-1) for part in (weight.before, weight.parts))
    if old.size > 1:
        old = old.take(next(iter(keep.values()))) if keep else old
    ratio = new / np.where(old == 0, 1, old)
    return (own * (ratio if ratio.size > 1 else ratio[0])).astype(own.dtype)


def weight_of(value: ir.Value, cut: Mapping[str, CutConstant]) -> CutConstant | None:
    """The quantized weight of the node that also reads the bias ``value``."""
    for node, index in value.uses():
        for other in node.inputs[:index]:
            if other is not None and other.name in cut:
                return cut[str(other.name)]
    return None
