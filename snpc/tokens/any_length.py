"""Merging where the graph computes the number of tokens, for inputs of any length: tokens in even places are merged
into tokens in odd ones.

The numbers follow from the stream and the decisions: ``order`` [B, even places] and ``into`` [B, merged tokens].
"""

from __future__ import annotations

import onnx_ir as ir

from snpc.ops import ADD, DIV, EQUAL, GATHER, MUL, SCATTER_ELEMENTS, SHAPE, SLICE, SUB
from snpc.tokens.writer import END_OF_AXIS, TokenGraphBuilder


def every_second(writer: TokenGraphBuilder, value: ir.Value, start: int) -> ir.Value:
    return writer.slice(value, 1, start, step=2)


def split_at(writer: TokenGraphBuilder, value: ir.Value, end: ir.Value) -> list[ir.Value]:
    """``value`` up to the position ``end`` [1], and from there on."""
    rest = writer.op(SLICE, value, end, writer.ints(END_OF_AXIS), writer.ints(1), writer.ints(1))
    return [writer.slice_to(value, 1, end), rest]


def targets(writer: TokenGraphBuilder, value: ir.Value, leading: int) -> ir.Value:
    """The rows of leading tokens and of those that others are merged into."""
    front = [writer.slice(value, 1, 0, leading)] if leading else []
    return writer.concat(1, *front, every_second(writer, value, leading + 1))


def merged_into(writer: TokenGraphBuilder, rows: ir.Value, into: ir.Value, leading: int) -> ir.Value:
    """[B, targets, merged tokens]: is each of these tokens merged into each target? ``rows``: the targets."""
    stop = writer.op(SUB, writer.gather_one(writer.op(SHAPE, rows), 0, 1), writer.integer(leading))
    places = writer.unsqueeze(writer.integers(writer.integer(-leading), stop), 0, 2)
    return writer.op(EQUAL, places, writer.unsqueeze(into, 1))


def any_length_assignment(
    writer: TokenGraphBuilder, before: ir.Value, order: ir.Value, into: ir.Value, leading: int
) -> ir.Value:
    """[B, N]: the position, behind the step, of what each token of ``before`` [B, N, D] became part of."""
    count, even, merged = (writer.gather_one(writer.op(SHAPE, value), 0, 1) for value in (before, order, into))
    first, two = writer.integer(leading), writer.integer(2)
    fixed = writer.op(SUB, count, even)  # leading tokens and those in odd places
    batch = writer.sizes(order, 0)

    def spread(row: ir.Value) -> ir.Value:
        return writer.expand(row, writer.concat(0, batch, writer.op(SHAPE, row)))

    stay = spread(writer.integers(fixed, writer.op(SUB, count, merged)))
    places = writer.concat(1, writer.op(ADD, into, first), stay)
    new = writer.op(SCATTER_ELEMENTS, order, order, places, axis=1)
    every = writer.concat(1, spread(writer.integers(writer.integer(0), fixed)), new)
    other = writer.integers(writer.integer(0), writer.op(SUB, count, first))
    half = writer.op(DIV, other, two)
    is_even = writer.op(SUB, writer.integer(1), writer.op(SUB, other, writer.op(MUL, half, two)))
    jump = writer.op(MUL, is_even, writer.op(SUB, fixed, first))
    index = writer.op(ADD, writer.op(ADD, half, first), jump)
    front = [writer.ints(*range(leading))] if leading else []
    return writer.op(GATHER, every, writer.concat(0, *front, index), axis=1)
