"""Rotary positions in one node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from snpc.ops.spec import MICROSOFT, OpCall, OpSpec
from snpc.types import IntArray, Shape


@dataclass(frozen=True)
class RotaryForm:
    """``cosine``/``sine``: inputs of the tables [..., width/2]; ``heads`` is 0 where the input is [B,H,N,D] already;
    ``width`` channels of each head turn, in neighboring pairs where ``interleaved``, else first half with second."""

    cosine: int
    sine: int
    heads: int
    width: int
    interleaved: bool


def rotary_form(call: OpCall, domain: str) -> RotaryForm:
    cosine, sine = (2, 3) if domain == MICROSOFT else (1, 2)
    width = 2 * call.shape(cosine)[-1]
    heads = 0
    if len(call.shape(0)) == 3:
        heads = int(call.attrs.get("num_heads", 0)) or call.shape(0)[2] // width
    return RotaryForm(cosine, sine, heads, width, bool(call.attrs.get("interleaved", 0)))


def rotated_pairs(shape: RotaryForm) -> IntArray:
    """[width]: the pair that each turned channel belongs to."""
    channels = np.arange(shape.width)
    return channels // 2 if shape.interleaved else channels % (shape.width // 2)


def _rotary_shapes(call: OpCall) -> list[Shape]:
    return [call.shape(0)]


def _resize_rotary_attributes(
    call: OpCall, domain: str, parts: Mapping[str, Shape], cuts: Mapping[int, Shape]
) -> Mapping[str, Any]:
    """Heads, and how many channels turn, where attributes spell them."""
    attrs = {}
    if call.attrs.get("num_heads"):
        attrs["num_heads"] = parts["rotated"][1]
    if call.attrs.get("rotary_embedding_dim"):
        attrs["rotary_embedding_dim"] = 2 * cuts[rotary_form(call, domain).cosine][-1]
    return attrs


def rotary_entries() -> list[OpSpec]:
    says = "both channels of a pair and their column of the tables go together, in all heads that share the tables"
    return [
        OpSpec("RotaryEmbedding", "rotary", says, resize_head_attributes=_resize_rotary_attributes),
        OpSpec(
            "RotaryEmbedding",
            "rotary",
            says,
            domain=MICROSOFT,
            resize_head_attributes=_resize_rotary_attributes,
            out_shapes=_rotary_shapes,
        ),
    ]
