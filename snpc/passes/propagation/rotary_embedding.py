"""Rotary positions in one node: the two channels of a pair, and the column of the tables that turns them, are one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.rotary import RotaryForm, rotary_form, rotated_pairs
from snpc.passes.propagation.head_layout import merge_heads, split_heads
from snpc.passes.propagation.labels import Flag, varying
from snpc.passes.propagation.pointwise import meet
from snpc.passes.propagation.state import Carried, Factors, Here


def rotary(here: Here, inputs: Sequence[Carried | None]) -> list[Factors]:
    """RotaryEmbedding of [B,H,N,D], or of [B,N,H*D] with the number of heads in an attribute."""
    shape = rotary_form(here.call, here.node.domain)
    data, cosine, sine = (inputs[k] for k in (0, shape.cosine, shape.sine))
    assert data is not None and cosine is not None and sine is not None
    whole = split_heads(data, shape.heads) if shape.heads else data
    here.trace.extra[here.node, "rotated"] = whole
    turned = rotate(here, whole, [cosine, sine], shape)
    return [merge_heads(turned).factors if shape.heads else turned.factors]


def rotate(here: Here, data: Carried, tables: Sequence[Carried], shape: RotaryForm) -> Carried:
    """``data``: [B,H,N,D], of which the first ``shape.width`` channels turn; tables: [..., width/2]."""
    places = rotated_pairs(shape)
    columns = [Carried(t.name, (1, 1, 1, len(places)), column_labels(here, t, places), t.constant) for t in tables]
    parts = [
        Carried(
            data.name,
            (*data.shape[:3], len(places)),
            tuple(f[..., : len(places)] if f.shape[3] > 1 else f for f in data.factors),
            data.constant,
        ),
        *columns,
    ]
    factors = meet(here, parts)
    for labels in factors:
        here.trace.book.flag(labels, Flag.GATED)
    if len(places) == data.shape[3]:
        return Carried(data.name, data.shape, factors, data.constant)
    return data  # its labels are those of the rotated part and of the rest, as they were


def column_labels(here: Here, table: Carried, places: np.typing.NDArray[np.int64]) -> Factors:
    """Labels of a table's columns, for every channel that they turn; its rows are read by position."""
    found = []
    for labels in table.factors:
        if varying(labels) == {labels.ndim - 1}:
            found.append(labels.reshape(-1)[places].reshape(1, 1, 1, -1))
        else:
            here.pin(table, labels, "which entries are read depends on the positions")
    return tuple(found)
