"""What a quantized file holds once its float constants are cut: codes as they are, or quantized anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.ops import QuantizedArray, common_block, read_stored, write_stored
from snpc.passes.canonicalization import original_name
from snpc.passes.quantization.float_values import stored
from snpc.types import AnyArray, IntArray, QuantizedForm, Shape, StoredConstant

Keep = Mapping[int, IntArray]
"""Axis -> positions that stay, of the axes that are cut."""


@dataclass(frozen=True)
class CutConstant:
    """A constant after the cut. ``parts``: those of its stored parts that are others now. ``shape``: of the float
    constant. ``sliced``: its codes and scales are among those of the file. ``bias_scale``: of a bias, which has that of
    its weight and its input. ``block``: so many entries share a scale, where they are fewer now."""

    constant: StoredConstant
    parts: Mapping[str, AnyArray]
    shape: Shape
    sliced: bool
    bias_scale: AnyArray | None = None
    block: int = 0

    @property
    def attributes(self) -> Mapping[str, int]:
        """Those of its reader that the cut changes."""
        sizes = {"K": self.shape[0], "N": self.shape[1]} if self.constant.layout == "product" else {}
        return {**sizes, **({"block_size": self.block} if self.block else {})}

    def part(self, form: QuantizedForm, part: str) -> AnyArray:
        return self.parts[part] if part in self.parts else stored_array(form, self.constant.parts[part])

    def floats(self, form: QuantizedForm) -> AnyArray:
        """What it stands for."""
        held = {part: self.part(form, part) for part in self.constant.parts}
        layout, attributes = self.constant.layout, {**self.constant.attributes, **self.attributes}
        if self.bias_scale is not None:
            layout, held = "tensor", {"codes": held["codes"], "scale": self.bias_scale}
        return read_stored(layout, held, attributes, self.constant.axis, self.block or self.constant.block).dequantize()


def cut_constants(
    form: QuantizedForm, whole: ir.Model, model: ir.Model, keep: Mapping[str, Keep]
) -> dict[str, CutConstant]:
    """Float constant of ``model``, a cut of the float graph ``whole`` -> what the quantized file holds for it.

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
        tensor, weight = value.const_value, weight_of(value, cut)
        assert tensor is not None
        before = whole.graph.initializers.get(name)
        moved = shares_scale(form, constant) and weight is not None and not weight.sliced
        if before is not None and before.const_value is tensor and not moved:
            cut[name] = CutConstant(constant, {}, tuple(int(n) for n in tensor.shape), True)  # type: ignore[arg-type]
        else:
            cut[name] = cut_constant(form, constant, tensor.numpy(), keep.get(name, {}), weight)
    return cut


def shares_scale(form: QuantizedForm, constant: StoredConstant) -> bool:
    """Whether a constant is a bias, which has the scale of a weight: that has to be known first."""
    return form.graph.graph.initializers[constant.parts["codes"]].dtype == ir.DataType.INT32


def stored_array(form: QuantizedForm, name: str) -> AnyArray:
    tensor = stored(form.graph.graph.initializers[name])
    assert tensor is not None
    return np.asarray(tensor.numpy())


def cut_constant(
    form: QuantizedForm, constant: StoredConstant, wanted: AnyArray, keep: Keep, weight: CutConstant | None
) -> CutConstant:
    """``wanted`` as what the file holds. ``weight``: the one whose scale a bias shares."""
    before = {part: stored_array(form, initializer) for part, initializer in constant.parts.items()}
    whole = read_stored(constant.layout, before, constant.attributes, constant.axis, constant.block)
    smaller = whole if constant.layout == "experts" else in_common_blocks(whole, keep)  # one node has several of those
    taken = smaller.take(keep)
    is_bias = shares_scale(form, constant)
    scale = scale_of_bias(form, taken.scale, weight, keep) if is_bias else None
    sliced = np.array_equal(taken.dequantize().astype(wanted.dtype), wanted)
    sliced = sliced and (scale is None or np.array_equal(scale, taken.scale))
    array = taken if sliced else whole.take(keep).quantize(wanted, scale)
    parts = write_stored(constant.layout, array, before, constant.attributes)
    check_bytes_are_full(constant, array, parts)
    changed = {part: contents for part, contents in parts.items() if not np.array_equal(contents, before[part])}
    block = array.block if array.block != whole.block else 0
    return CutConstant(constant, changed, array.codes.shape, sliced, scale, block)


def in_common_blocks(whole: QuantizedArray, keep: Keep) -> QuantizedArray:
    """``whole`` in blocks so small that none is cut in part, where kernels take such."""
    kept = keep.get(whole.axis % whole.codes.ndim)
    block = common_block(kept, whole.block) if kept is not None and whole.block else 0
    return whole.in_blocks_of(block) if block not in (0, whole.block) else whole


def check_bytes_are_full(constant: StoredConstant, array: QuantizedArray, parts: Mapping[str, AnyArray]) -> None:
    """Raise CheckFailed where rows of packed codes fill their last byte in part: then it would have more."""
    codes = parts["codes"]
    if constant.layout not in ("table", "experts") or codes.dtype != np.uint8:
        return
    columns = codes.shape[-1] * 8 // int(constant.attributes["bits"])
    if columns != array.codes.shape[-1]:
        raise CheckFailed(
            f"{constant.parts['codes']}: {array.codes.shape[-1]} columns do not fill bytes; try --round-to 2, or "
            "--dequantize, which takes the float model"
        )


def scale_of_bias(form: QuantizedForm, own: AnyArray, weight: CutConstant | None, keep: Keep) -> AnyArray:
    """The scale of a bias is that of its weight times that of the input: it changes as the weight's does."""
    if weight is None or weight.sliced:
        return own
    old = stored_array(form, weight.constant.parts["scale"]).astype(np.float32).reshape(-1)
    new = weight.part(form, "scale").astype(np.float32).reshape(-1)
    if old.size > 1 and keep:
        old = old.take(next(iter(keep.values())))
    ratio = new / np.where(old == 0, 1, old)
    return np.asarray(own * (ratio if ratio.size > 1 else ratio[0]), own.dtype)


def weight_of(value: ir.Value, cut: Mapping[str, CutConstant]) -> CutConstant | None:
    """The quantized weight of the node that also reads the bias ``value``."""
    for node, index in value.uses():
        for other in node.inputs[:index]:
            if other is not None and other.name in cut:
                return cut[str(other.name)]
    return None
