"""What the scores lose when pairs of query and key columns go: a quadratic form in the pairs, summed in the graph.

The scores of one head are s = sum_u q_u k_u' over units u (a unit has one column, or a rotary pair of two). Without the
units P they change by sum_{u in P} q_u k_u', and the squared change over all queries and keys is the sum over P x P of

    M[u, v] = sum_{a in u, b in v} (Q'Q)_ab (K'K)_ab

with K centred, since softmax does not see what all keys share. That is exact per sample and head, whatever lies between
the projections and the product, and adds up over heads, samples and layers that must keep the same units.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.ops import names as op
from snpc.passes.propagation.state import Contraction
from snpc.passes.weights.attention_operands import score_axes
from snpc.runtime.statistics.instrument import Instrument
from snpc.types import Group


def score_loss_matrix(instrument: Instrument, product: Contraction, group: Group) -> ir.Value:
    """[blocks, size, size]: M of each block over the samples."""
    sides = score_axes(product, group)
    rank = len(sides.query)
    query, key = (
        instrument.transpose(instrument.cast_float32(instrument.activation(name)), *axes)
        for name, axes in ((product.left.name, sides.query), (product.right.name, sides.key))
    )
    query = instrument.zero_masked(query, operand_row_mask(instrument, product.left.name, sides.query))
    key = center_rows(instrument, key, operand_row_mask(instrument, product.right.name, sides.key))
    both = instrument.node(op.MUL, [last_axes_gram(instrument, query, rank), last_axes_gram(instrument, key, rank)])
    units = sides.units.reshape(-1, sides.units.shape[-1])
    fixed = [k for k in range(rank - 2) if sides.units.shape[k] == 1]
    if fixed:
        both = instrument.reduce(op.REDUCE_SUM, both, fixed)
    both = instrument.reshape(both, *units.shape, units.shape[1])
    picks = np.zeros((*units.shape, group.size), np.float32)
    owner = np.zeros((group.blocks, len(units)), np.float32)
    for head, row in enumerate(units):
        mine = np.flatnonzero(row >= 0)
        picks[head, mine, row[mine] % group.size] = 1
        owner[np.unique(row[mine] // group.size), head] = 1
    turned = instrument.constant(np.ascontiguousarray(picks.transpose(0, 2, 1)))
    found = instrument.node(op.MATMUL, [instrument.node(op.MATMUL, [turned, both]), instrument.constant(picks)])
    summed = instrument.node(
        op.MATMUL, [instrument.constant(owner), instrument.reshape(found, len(units), group.size**2)]
    )
    return instrument.reshape(summed, group.blocks, group.size, group.size)


def last_axes_gram(instrument: Instrument, value: ir.Value, rank: int) -> ir.Value:
    """X'X of the last two axes."""
    return instrument.node(op.MATMUL, [instrument.transpose(value, *range(rank - 2), rank - 1, rank - 2), value])


def center_rows(instrument: Instrument, value: ir.Value, counts: ir.Value | None) -> ir.Value:
    """Rows less the mean of those that count, zero for the others."""
    value = instrument.zero_masked(value, counts)
    total = [
        instrument.reduce(op.REDUCE_SUM, v, [-2], keep=True) for v in (value, instrument.ones_column(value, counts))
    ]
    return instrument.zero_masked(instrument.node(op.SUB, [value, instrument.node(op.DIV, total)]), counts)


def operand_row_mask(instrument: Instrument, tensor: str, axes: tuple[int, ...]) -> ir.Value | None:
    """[samples, 1.., rows, 1] bool; None where all rows count, or where it is not known which."""
    told = instrument.row_masks.get(tensor)
    counts = instrument.row_mask(tensor) if told is not None and told.order == "plain" and axes[0] == 0 else None
    return None if counts is None else instrument.reshape(counts, 0, *[1] * (len(axes) - 3), -1, 1)
