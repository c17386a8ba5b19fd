"""Checks that arrays fit the model's inputs: names, types, ranks and sizes when opened, values when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.sources import CalibrationPart, name_list, require_inputs
from snpc.runtime.io import ArrayHeader
from snpc.types import AnyArray, IntArray, Shape, TensorSpec, shape_text

TypeFamily = Literal["bool", "int", "float", "other"]

SAFE_CASTS: frozenset[tuple[TypeFamily, TypeFamily]] = frozenset(
    {
        ("bool", "bool"), ("int", "int"), ("float", "float"),
        ("bool", "int"), ("int", "bool"), ("bool", "float"), ("int", "float"),
    }
)  # fmt: skip


MAX_SAMPLES = 1 << 28  # of one part; each has a number


@dataclass(frozen=True)
class SampleAxes:
    """``inputs``: names of inputs whose leading axis is the sample axis; the others are fed as they are.

    ``batch_size``: the static size of that axis, None where it is dynamic.
    """

    inputs: frozenset[str]
    batch_size: int | None


def find_sample_axes(inputs: Sequence[TensorSpec]) -> SampleAxes:
    """Inputs with a sample axis: those whose leading axis is dynamic, or else has the most common static size.

    A static leading axis next to dynamic ones (``use_cache_branch [1]``, a table of positions) cannot be the batch. Of
    equally common static sizes the first input's wins.
    """
    leads = {spec.name: spec.shape[0] for spec in inputs if spec.shape}
    if not leads:
        names = name_list(spec.name for spec in inputs)
        raise UserError(f"the model takes only scalars ({names}): without a sample axis it cannot be calibrated")
    dynamic = frozenset(name for name, lead in leads.items() if isinstance(lead, str))
    if dynamic:
        return SampleAxes(dynamic, None)
    size = Counter(leads.values()).most_common(1)[0][0]
    assert isinstance(size, int)
    if size < 1:
        raise UserError(f"the model's batch size is {size}: no sample can be fed to it")
    return SampleAxes(frozenset(name for name, lead in leads.items() if lead == size), size)


def sample_shapes(part: CalibrationPart, inputs: Sequence[TensorSpec], allow_single: bool) -> dict[str, Shape]:
    """[sample, ...] shape per input once names, types and ranks fit; a single sample gets its leading axis here."""
    require_inputs(part.label, part.headers, inputs)
    return {spec.name: _sample_shape(part.label, part.headers[spec.name], spec, allow_single) for spec in inputs}


def count_samples(
    part: CalibrationPart, shapes: dict[str, Shape], inputs: Sequence[TensorSpec], axes: SampleAxes
) -> int:
    """How many samples a part holds; UserError where static sizes or the inputs' sample counts disagree."""
    for spec in inputs:
        _check_sizes(part.label, shapes[spec.name], spec, spec.name in axes.inputs)
    counts = {spec.name: shapes[spec.name][0] for spec in inputs if spec.name in axes.inputs}
    (first, samples), *others = counts.items()
    if samples > MAX_SAMPLES:
        raise UserError(f"{part.label}: '{first}' claims {samples} samples: more than {MAX_SAMPLES} are not read")
    for name, other in others:
        if other != samples:
            raise UserError(
                f"{part.label}: {samples} samples of '{first}' but {other} of '{name}': give every input as many"
            )
    return samples


def validate_and_convert(array: AnyArray, spec: TensorSpec, label: str, rows: IntArray | None) -> AnyArray:
    """``array`` in the model's type. ``rows``: numbers of its samples for messages, None without a sample axis.

    Raises UserError for NaN, infinity, a mask that hides every token, and values that the type cannot hold.
    """
    _check_finite(array, spec, label, rows)
    _check_mask(array, spec, label, rows)
    return _convert(array, spec, label, rows)


def _sample_shape(label: str, header: ArrayHeader, spec: TensorSpec, allow_single: bool) -> Shape:
    _check_type(label, header.dtype, spec)
    if len(header.shape) == len(spec.shape):
        return header.shape
    if allow_single and len(header.shape) == len(spec.shape) - 1 and header.shape != (0,):  # [] is no sample
        return (1, *header.shape)
    raise UserError(
        f"{label}: input '{spec.name}' has {len(spec.shape)} axes {shape_text(spec.shape)}, the data "
        f"{len(header.shape)} {shape_text(header.shape)}: store it as the model takes it, "
        "samples along the leading axis"
    )


def _check_type(label: str, data_type: np.dtype[Any], spec: TensorSpec) -> None:
    subject = f"{label}: input '{spec.name}' takes {spec.dtype}, the data is {data_type}"
    if data_type.hasobject:
        raise UserError(f"{subject}: arrays of Python objects are pickles, which snpc never loads; save plain numbers")
    pair = (_type_family(data_type), _type_family(spec.dtype))
    if pair in SAFE_CASTS:
        return
    if "other" in pair:
        raise UserError(f"{subject}: only booleans, integers and floats can be fed; save it as one of those")
    raise UserError(f"{subject}: rounding would change it; save it as {spec.dtype}")


def _check_sizes(label: str, shape: Shape, spec: TensorSpec, sampled: bool) -> None:
    start = 1 if sampled else 0
    for model_size, data_size in zip(spec.shape[start:], shape[start:], strict=True):
        if isinstance(model_size, int) and model_size != data_size:
            why = "" if sampled else " (fed whole with every batch: its leading axis is not the samples')"
            raise UserError(
                f"{label}: input '{spec.name}' takes {shape_text(spec.shape)}{why}, the data is {shape_text(shape)}: "
                "resize, pad or cut it to the model's sizes"
            )


def _check_finite(array: AnyArray, spec: TensorSpec, label: str, rows: IntArray | None) -> None:
    if _type_family(array.dtype) != "float":
        return
    nan, infinite = np.asarray(np.isnan(array)), np.asarray(np.isinf(array))
    if "mask" in spec.name.lower():
        infinite = infinite & (array > 0)  # an additive mask forbids positions with -inf
    if nan.any() or infinite.any():
        what, bad = ("NaN", nan) if nan.any() else ("infinity", infinite)
        raise UserError(
            f"{label}: input '{spec.name}' holds {what} in {_sample_text(bad, rows)}: repair it or leave it out"
        )


def _check_mask(array: AnyArray, spec: TensorSpec, label: str, rows: IntArray | None) -> None:
    """Refuse a mask that hides every token. An additive mask (float, more axes than [B,T]) is 0 for visible tokens."""
    name = spec.name.lower()
    if rows is None or "global" in name or not ("attention_mask" in name or "input_mask" in name):
        return
    if _type_family(spec.dtype) == "float" and array.ndim > 2:
        return
    hidden = ~_any_per_sample(array)
    if hidden.any():
        raise UserError(
            f"{label}: {spec.name} of {_sample_text(hidden, rows)} is all zeros, which hides every token: "
            "set it to 1 where there are tokens"
        )


def _convert(array: AnyArray, spec: TensorSpec, label: str, rows: IntArray | None) -> AnyArray:
    if array.dtype == spec.dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result: AnyArray = array.astype(spec.dtype)
        lost = _changed_values(array, result)
    if lost.any():
        raise UserError(
            f"{label}: input '{spec.name}' takes {spec.dtype}, which cannot hold {array[lost].flat[0]} in "
            f"{_sample_text(lost, rows)}: check how the data was made"
        )
    return result


def _changed_values(array: AnyArray, result: AnyArray) -> AnyArray:
    """Where a conversion did more than round: floats out of range, any change of integers and booleans."""
    if _type_family(array.dtype) == "float":
        return np.asarray(np.isfinite(array) & ~np.isfinite(result))
    # -1 survives the way to uint64 and back, hence the signs
    return np.asarray((result.astype(array.dtype) != array) | ((result < 0) != (array < 0)))


def _sample_text(bad: AnyArray, rows: IntArray | None) -> str:
    if rows is None or not bad.ndim:
        return "every sample"
    return f"sample {rows[int(np.argmax(_any_per_sample(bad)))]}"


def _any_per_sample(array: AnyArray) -> AnyArray:
    """[samples, ...] -> [samples]: whether any entry is true."""
    return np.asarray(array.any(axis=tuple(range(1, array.ndim))))


def _type_family(dtype: np.dtype[Any]) -> TypeFamily:
    if dtype.kind == "f" or dtype.name == "bfloat16":  # ml_dtypes' bfloat16 does not call itself a float
        return "float"
    families: dict[str, TypeFamily] = {"b": "bool", "i": "int", "u": "int"}
    return families.get(dtype.kind, "other")
