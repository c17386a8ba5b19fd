"""Rotary positions in one node: the two channels of a pair, and the column of the tables that turns them, are one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops.rotary import RotaryForm, rotary_form, rotated_pairs
from snpc.passes.propagation.head_layout import merge_head_labels, split_head_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext


def propagate_rotary(here: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """RotaryEmbedding of [B,H,N,D], or of [B,N,H*D] with the number of heads in an attribute."""
    shape = rotary_form(here.call, here.node.domain)
    data, cosine, sine = (inputs[k] for k in (0, shape.cosine, shape.sine))
    assert data is not None and cosine is not None and sine is not None
    whole = split_head_labels(data, shape.heads) if shape.heads else data
    here.trace.inner_values[here.node, "rotated"] = whole
    turned = unify_rotated_pairs(here, whole, [cosine, sine], shape)
    return [merge_head_labels(turned).factors if shape.heads else turned.factors]


def unify_rotated_pairs(
    here: NodeContext, data: LabeledValue, tables: Sequence[LabeledValue], shape: RotaryForm
) -> LabeledValue:
    """``data``: [B,H,N,D], of which the first ``shape.width`` channels turn; tables: [..., width/2]."""
    places = rotated_pairs(shape)
    columns = [
        LabeledValue(t.name, (1, 1, 1, len(places)), table_column_labels(here, t, places), t.constant) for t in tables
    ]
    parts = [
        LabeledValue(
            data.name,
            (*data.shape[:3], len(places)),
            tuple(f[..., : len(places)] if f.shape[3] > 1 else f for f in data.factors),
            data.constant,
        ),
        *columns,
    ]
    factors = unify_factors(here, parts)
    for labels in factors:
        here.trace.table.flag(labels, LabelFlag.GATED)
    if len(places) == data.shape[3]:
        return LabeledValue(data.name, data.shape, factors, data.constant)
    return data  # its labels are those of the rotated part and of the rest, as they were


def table_column_labels(here: NodeContext, table: LabeledValue, places: np.typing.NDArray[np.int64]) -> Factors:
    """Labels of a table's columns, for every channel that they turn; its rows are read by position."""
    found = []
    for labels in table.factors:
        if varying_axes(labels) == {labels.ndim - 1}:
            found.append(labels.reshape(-1)[places].reshape(1, 1, 1, -1))
        else:
            here.pin(table, labels, "which entries are read depends on the positions")
    return tuple(found)
