"""Inputs of a text model that follow from its token ids: filled in where the data has none of their own.

| input | type and shape | filled with |
|---|---|---|
| ``attention_mask``, ``input_mask``, ``mask`` | integer or bool [batch, tokens] | ones |
| ``position_ids`` | integer [batch, tokens] | 0, 1, 2, ... over the tokens that the mask shows |
| ``token_type_ids``, ``segment_ids`` | integer [batch, tokens] | zeros |
| ``encoder_attention_mask`` | integer or bool [batch, frames] | ones, as many as ``encoder_hidden_states`` has frames |
| caches of the decoder's own tokens | float, four axes, one dynamic beside the batch | nothing, or a window of zeros |
| ``use_cache_branch`` | bool [1] | false |

Data that has such an input is fed as it is. Caches that are made of ``encoder_hidden_states`` are empty where a decoder
takes those too. Any other input must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.graph import DecoderInput, decoder_input
from snpc.runtime.calibration.sources import (
    ArraysInMemory,
    CalibrationPart,
    CalibrationSource,
    FilledKind,
    name_list,
    part_in_memory,
)
from snpc.runtime.calibration.validation import find_sample_axes
from snpc.runtime.io import ArrayHeader
from snpc.types import AnyArray, Shape, TensorSpec

FILLED_BY_KIND: Mapping[DecoderInput, FilledKind] = {
    "mask": "ones",
    "encoder_mask": "ones",
    "positions": "counted",
    "types": "zeros",
}


def find_ids(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The input [batch, tokens] that takes token ids: the one called ``input_ids``, or the only one of integers that
    is no mask, position or type. None where there is none, or no telling."""
    integers = [
        spec for spec in inputs if len(spec.shape) == 2 and spec.dtype.kind in "iu" and filled_kind(spec) is None
    ]
    named = [spec for spec in integers if decoder_input(spec.name) == "ids"]
    found = named or integers
    return found[0] if len(found) == 1 else None


def find_mask(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The input [batch, tokens] that is 0 at padding; None where the model takes none."""
    masks = (spec for spec in inputs if decoder_input(spec.name) == "mask")
    return next((spec for spec in masks if filled_kind(spec) == "ones"), None)


def find_states(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The input [batch, frames, width] that takes the states of an encoder; None where the model takes none."""
    return next((s for s in inputs if decoder_input(s.name) == "encoder_states" and len(s.shape) == 3), None)


def filled_kind(spec: TensorSpec) -> FilledKind | None:
    """What an input is filled with, by its name, type and shape; None for one that must be given."""
    role, rank = decoder_input(spec.name), len(spec.shape)
    if role in ("cache", "encoder_cache") and rank == 4 and (spec.dtype.kind == "f" or spec.dtype.name == "bfloat16"):
        dynamic = [dim for dim in spec.shape[1:] if isinstance(dim, str)]
        return "empty" if len(dynamic) == 1 else None
    if role == "branch" and rank == 1 and spec.dtype.kind == "b":
        return "false"
    if rank != 2 or spec.dtype.kind not in "iub":
        return None
    kind = FILLED_BY_KIND.get(role) if role is not None else None
    return kind if kind == "ones" or spec.dtype.kind != "b" else None


def fillable_inputs(inputs: Sequence[TensorSpec], present: Collection[str]) -> dict[str, FilledKind]:
    """Inputs that data with these arrays lacks and that can be filled in: none without ids, and neither a mask of
    encoder states nor caches that are made of them without these."""
    ids, states = find_ids(inputs), find_states(inputs)
    if ids is None or ids.name not in present:
        return {}
    no_states = states is None or states.name not in present
    of_states = ("encoder_mask", "encoder_cache")
    kinds = {
        spec.name: filled_kind(spec)
        for spec in inputs
        if spec.name not in present and not (no_states and decoder_input(spec.name) in of_states)
    }
    return {name: kind for name, kind in kinds.items() if kind is not None}


def inputs_to_give(inputs: Sequence[TensorSpec], present: Iterable[str]) -> list[TensorSpec]:
    """The inputs that data with these arrays must have."""
    filled = fillable_inputs(inputs, set(map(str, present)))
    return [spec for spec in inputs if spec.name not in filled]


def sole_input(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """The one input that data must have; None where there are several."""
    ids = find_ids(inputs)
    needed = inputs_to_give(inputs, [ids.name]) if ids is not None else inputs
    return needed[0] if len(needed) == 1 else None


def describe_filled(filled: Mapping[str, FilledKind]) -> str:
    """``attention_mask (ones), past_key_values.0.key and 59 more (empty)``; "" where nothing was filled in."""
    names_by_kind: dict[FilledKind, list[str]] = {}
    for name, kind in filled.items():
        names_by_kind.setdefault(kind, []).append(name)
    return ", ".join(f"{name_list(names, 1)} ({kind})" for kind, names in names_by_kind.items())


def with_filled_inputs(source: CalibrationSource) -> CalibrationSource:
    """The source with what follows from its ids."""
    if find_ids(source.inputs) is None:
        return source
    return replace(source, parts=(filled_part(part, source.inputs) for part in source.parts))


def filled_part(part: CalibrationPart, inputs: Sequence[TensorSpec]) -> CalibrationPart:
    """The part with the inputs that it lacks and that follow from its ids."""
    kinds, ids = fillable_inputs(inputs, part.headers), find_ids(inputs)
    if not kinds or ids is None:
        return part
    shape = part.headers[ids.name].shape
    samples, tokens = (shape[0] if len(shape) > 1 else 1), (shape[-1] if shape else 1)
    states = find_states(inputs)
    frames = part.headers[states.name].shape[-2] if states is not None and states.name in part.headers else tokens
    sampled = find_sample_axes(inputs).inputs
    specs = [spec for spec in inputs if spec.name in kinds]
    lengths = {spec.name: frames if decoder_input(spec.name) == "encoder_mask" else tokens for spec in specs}
    shapes = {s.name: filled_shape(s, kinds[s.name], samples, lengths[s.name], sampled) for s in specs}
    mask = find_mask(inputs)
    given_mask = mask.name if mask is not None and mask.name in part.headers else None
    arrays = {spec.name: FilledArray(kinds[spec.name], shapes[spec.name], spec.dtype.name) for spec in specs}
    read = FilledReader(part.read, arrays, given_mask)
    if isinstance(part.read, ArraysInMemory):  # stays in memory, so that its rows can be sent
        part = part_in_memory(part.label, read([*part.headers, *kinds]))
        return replace(part, filled=kinds)
    headers = {spec.name: ArrayHeader(shapes[spec.name], spec.dtype) for spec in specs}
    return CalibrationPart(part.label, {**part.headers, **headers}, read, kinds)


def filled_shape(spec: TensorSpec, kind: FilledKind, samples: int, tokens: int, sampled: Collection[str]) -> Shape:
    """The shape that an input has beside ids [samples, tokens], or beside as many frames."""
    lead = samples if spec.name in sampled else spec.shape[0]
    assert isinstance(lead, int)  # a dynamic leading axis is that of the samples
    if kind in ("empty", "false"):
        return (lead, *(dim if isinstance(dim, int) else spec.capacity for dim in spec.shape[1:]))
    return (lead, tokens)


@dataclass(frozen=True)
class FilledArray:
    """An array that is made when it is read."""

    kind: FilledKind
    shape: Shape
    dtype: str

    def make(self, mask: AnyArray | None) -> AnyArray:
        """``mask``: 0 at padding, [samples, tokens] or [tokens]; None shows all tokens."""
        if self.kind == "counted" and mask is not None:
            return count_positions(mask).reshape(self.shape).astype(self.dtype)
        if self.kind == "counted":
            return np.broadcast_to(np.arange(self.shape[-1]), self.shape).astype(self.dtype)
        return np.full(self.shape, self.kind == "ones", np.dtype(self.dtype))


def count_positions(mask: AnyArray) -> AnyArray:
    """[..., tokens], 0 at padding -> the number of visible tokens in front of each; 0 in front of the first."""
    return np.asarray(np.maximum(np.cumsum(mask != 0, axis=-1) - 1, 0))


@dataclass(frozen=True)
class FilledReader:
    """Reads a part, and makes what it lacks. ``mask``: the name of the mask in the part, None where it has none."""

    read: Callable[[Sequence[str]], Mapping[str, AnyArray]]
    filled: Mapping[str, FilledArray]
    mask: str | None

    def __call__(self, names: Sequence[str]) -> dict[str, AnyArray]:
        counted = any(self.filled[name].kind == "counted" for name in names if name in self.filled)
        wanted = [name for name in names if name not in self.filled]
        if self.mask is not None and counted and self.mask not in wanted:
            wanted.append(self.mask)
        stored = self.read(wanted) if wanted else {}
        mask = stored.get(self.mask) if self.mask is not None else None
        return {name: self.filled[name].make(mask) if name in self.filled else stored[name] for name in names}
