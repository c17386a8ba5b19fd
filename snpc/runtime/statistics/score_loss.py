"""The error of attention scores when units of query and key are removed: a quadratic form, summed in the graph.

The scores of one head are s = sum_u q_u k_u' over units u (a unit has one column, or two that form a rotary pair).
Removing the units P changes them by sum_{u in P} q_u k_u'. The squared change over all queries and keys is the sum over
P x P of

    M[u, v] = sum_{a in u, b in v} (Q'Q)_ab (K'K)_ab

with centered K, since softmax ignores what all keys have in common. This is exact per sample and head, whatever lies
between the projections and the product. M adds up over heads, samples and layers that must keep the same units.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.ops import names as op
from snpc.passes.propagation import Contraction
from snpc.passes.weights import ScoreAxes, score_axes
from snpc.runtime.statistics.instrument import Instrument
from snpc.types import Group


def score_loss_matrix(instrument: Instrument, product: Contraction, group: Group) -> ir.Value:
    """[blocks, size, size]: M of each block over the samples."""
    axes = score_axes(product, group)
    rank = len(axes.query)
    query, key = (
        instrument.transpose(instrument.cast_float32(score_operand(instrument, product, part, axes)), *permutation)
        for part, permutation in enumerate((axes.query, axes.key))
    )
    query = instrument.zero_masked(query, operand_row_mask(instrument, product.left.name, axes.query))
    key = center_rows(instrument, key, operand_row_mask(instrument, product.right.name, axes.key))
    grams = instrument.node(op.MUL, [last_axes_gram(instrument, query, rank), last_axes_gram(instrument, key, rank)])
    units = axes.units.reshape(-1, axes.units.shape[-1])
    fixed = [k for k in range(rank - 2) if axes.units.shape[k] == 1]
    if fixed:
        grams = instrument.reduce(op.REDUCE_SUM, grams, fixed)
    grams = instrument.reshape(grams, *units.shape, units.shape[1])
    columns_to_units = np.zeros((*units.shape, group.size), np.float32)
    heads_to_blocks = np.zeros((group.blocks, len(units)), np.float32)
    for head, row in enumerate(units):
        columns = np.flatnonzero(row >= 0)
        columns_to_units[head, columns, row[columns] % group.size] = 1
        heads_to_blocks[np.unique(row[columns] // group.size), head] = 1
    transposed = instrument.constant(np.ascontiguousarray(columns_to_units.transpose(0, 2, 1)))
    by_head = instrument.node(
        op.MATMUL, [instrument.node(op.MATMUL, [transposed, grams]), instrument.constant(columns_to_units)]
    )
    by_block = instrument.node(
        op.MATMUL, [instrument.constant(heads_to_blocks), instrument.reshape(by_head, len(units), group.size**2)]
    )
    return instrument.reshape(by_block, group.blocks, group.size, group.size)


def score_operand(instrument: Instrument, product: Contraction, part: int, axes: ScoreAxes) -> ir.Value:
    """Query (``part`` 0) or key of a product; of a fused node split into heads and turned, as it is inside."""
    side = (product.left, product.right)[part]
    if not axes.split_inside:
        return instrument.activation(side.name)
    return instrument.fused_heads(str(product.node.name), side.name, part, product.left.shape[1])


def last_axes_gram(instrument: Instrument, value: ir.Value, rank: int) -> ir.Value:
    """X'X of the last two axes."""
    return instrument.node(op.MATMUL, [instrument.transpose(value, *range(rank - 2), rank - 1, rank - 2), value])


def center_rows(instrument: Instrument, value: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Rows less the mean of those that count; zeros for the others."""
    value = instrument.zero_masked(value, mask)
    sums = [instrument.reduce(op.REDUCE_SUM, v, [-2], keep=True) for v in (value, instrument.ones_column(value, mask))]
    return instrument.zero_masked(instrument.node(op.SUB, [value, instrument.node(op.DIV, sums)]), mask)


def operand_row_mask(instrument: Instrument, tensor: str, axes: tuple[int, ...]) -> ir.Value | None:
    """[samples, 1.., rows, 1] bool: which rows of an operand count; None where all do, or where that is unknown."""
    row_mask = instrument.row_masks.get(tensor)
    if row_mask is None or row_mask.order != "batch_first" or axes[0] != 0:
        return None
    mask = instrument.row_mask(tensor)
    assert mask is not None
    return instrument.reshape(mask, 0, *[1] * (len(axes) - 3), -1, 1)
