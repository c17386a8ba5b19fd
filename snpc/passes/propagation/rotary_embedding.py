"""Label propagation through RotaryEmbedding, where both channels of a pair and their table column are unified, and
through selections of columns of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.ops import SHAPE_MISMATCH, Blocked, RotaryForm, rotary_form, rotated_pairs
from snpc.passes.propagation.head_layout import merge_head_labels, split_head_labels
from snpc.passes.propagation.labels import LabelFlag, varying_axes
from snpc.passes.propagation.pointwise import unify_factors
from snpc.passes.propagation.state import Factors, LabeledValue, NodeContext, prepend_axes


def propagate_rotary(context: NodeContext, inputs: Sequence[LabeledValue | None]) -> list[Factors]:
    """Factors of RotaryEmbedding over [batch, heads, tokens, width], or [batch, tokens, heads * width] with the number
    of heads in an attribute."""
    form = rotary_form(context.call, context.node.domain)
    data, cosine, sine = (inputs[k] if k < len(inputs) else None for k in (0, form.cosine, form.sine))
    if data is None or cosine is None or sine is None:
        raise Blocked(0, "it has no table of cosines and sines")
    whole = split_head_labels(data, form.heads) if form.heads else data
    context.trace.inner_values[context.node, "rotated"] = whole
    rotated = unify_rotated_pairs(context, whole, [cosine, sine], form)
    return [merge_head_labels(rotated).factors if form.heads else rotated.factors]


def unify_rotated_pairs(
    context: NodeContext, data: LabeledValue, tables: Sequence[LabeledValue], form: RotaryForm
) -> LabeledValue:
    """``data`` after the rotation of its first ``form.width`` channels: [batch, heads, tokens, width].

    ``tables``: cosines and sines, [..., form.width / 2]. Raises Blocked for data of other axes.
    """
    if len(data.shape) != 4:
        raise Blocked(0, SHAPE_MISMATCH)
    pair_columns = rotated_pairs(form)
    columns = [
        LabeledValue(t.name, (1, 1, 1, len(pair_columns)), table_column_labels(context, t, pair_columns), t.constant)
        for t in tables
    ]
    parts = [
        LabeledValue(
            data.name,
            (*data.shape[:3], len(pair_columns)),
            tuple(f[..., : len(pair_columns)] if f.shape[3] > 1 else f for f in data.factors),
            data.constant,
        ),
        *columns,
    ]
    factors = unify_factors(context, parts)
    for labels in factors:
        context.trace.table.flag(labels, LabelFlag.GATED)
    if len(pair_columns) == data.shape[3]:
        return LabeledValue(data.name, data.shape, factors, data.constant)
    return data  # the rotated channels and the others keep their labels


def table_column_labels(
    context: NodeContext, table: LabeledValue, pair_columns: np.typing.NDArray[np.int64]
) -> Factors:
    """[1, 1, 1, channels]: the label of the table column that rotates each channel. Rows are indexed by position."""
    factors = []
    for labels in table.factors:
        if varying_axes(labels) == {labels.ndim - 1}:
            factors.append(labels.reshape(-1)[pair_columns].reshape(1, 1, 1, -1))
        else:
            context.pin(table, labels, "the rows that are read depend on the position ids")
    return tuple(factors)


def propagate_column_selection(context: NodeContext, table: LabeledValue, columns: LabeledValue) -> Factors:
    """Factors of the columns that are selected of a table: on the last axis those of the selection. The table keeps all
    of its columns, as other selections read others."""
    factors = []
    for labels in table.factors:
        if labels.ndim - 1 in varying_axes(labels):
            context.pin(table, labels, "each layer selects columns of the table", labels.ndim - 1)
        else:
            factors.append(labels)
    rank = len(context.call.out_shapes[0])
    return (*factors, *(prepend_axes(labels, rank) for labels in columns.factors))
