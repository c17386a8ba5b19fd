"""Constant tokens: class, register, distillation and detection tokens, learned and concatenated to the sequence.

A token is constant where it enters the sequence independent of the input, wherever in the sequence that is. Each is the
only one of its kind, so it always stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from snpc.graph import is_float
from snpc.ops import Blocked
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenGraph
from snpc.types import BoolArray

MAX_TOKENS = 1 << 20  # of a sequence that is looked at; a damaged file may declare any length

TokenRange = tuple[int, int]
"""First position and the one behind the last. Counted from the end, (-100, 0), where a range ends the sequence."""


def find_constant_tokens(graph: TokenGraph) -> Mapping[int, frozenset[int]]:
    """Number of tokens of a sequence -> the positions of those that depend on no input."""
    from_data: dict[ir.Value, BoolArray] = {}  # per token, of values [batch, tokens, width] that have constant ones
    found: dict[int, frozenset[int]] = {}
    for node in graph.model.graph:
        out = node.outputs[0]
        shape = graph.facts.shape.get(out)
        if shape is None or len(shape) != 3 or out not in graph.data_dependent:  # else a table of positions
            continue
        if shape[TOKEN_AXIS] > MAX_TOKENS:
            continue
        for value, rows in zip(node.outputs, rows_from_data(graph, node, from_data), strict=False):
            if not rows.all():
                from_data[value] = rows
        if out in from_data and is_concat_of_tokens(graph, node) and is_float(graph.facts.dtype.get(out)):
            constant = frozenset(int(k) for k in np.flatnonzero(~from_data[out]))
            found[shape[TOKEN_AXIS]] = found.get(shape[TOKEN_AXIS], frozenset()) | constant
    return found


def rows_from_data(graph: TokenGraph, node: ir.Node, from_data: Mapping[ir.Value, BoolArray]) -> list[BoolArray]:
    """For each output of a node, which of its tokens depend on the input; all, where that is not known."""
    call, spec = graph.call(node), graph.spec(node)
    count = call.out_shapes[0][TOKEN_AXIS]
    if is_concat_of_tokens(graph, node):
        return [np.concatenate([value_rows(graph, v, from_data) for v in node.inputs if v is not None])]
    if spec.kind in ("pointwise", "concat"):
        rows = np.zeros(count, bool)
        for value in node.inputs:
            if value is not None and value in graph.data_dependent:
                known = from_data.get(value)
                rows |= known if known is not None and len(known) == count else True
        return [rows]
    moved = from_data.get(node.inputs[0]) if spec.kind == "movement" and node.inputs[0] is not None else None
    if moved is not None and spec.move is not None:
        try:
            labels = spec.move(call, np.arange(len(moved), dtype=np.int32).reshape(1, -1, 1))
        except Blocked:
            return [np.ones(count, bool)]
        sizes = [shape[TOKEN_AXIS] if len(shape) == 3 else -1 for shape in call.out_shapes]
        per_token = (found.shape == (1, size, 1) for found, size in zip(labels, sizes, strict=False))
        return [
            moved[found.reshape(-1)] if fits else np.ones(max(size, 1), bool)
            for found, size, fits in zip(labels, sizes, per_token, strict=False)
        ]
    return [np.ones(count, bool)]


def value_rows(graph: TokenGraph, value: ir.Value, from_data: Mapping[ir.Value, BoolArray]) -> BoolArray:
    """Which tokens of a value [batch, tokens, width] depend on the input."""
    count = (graph.facts.shape.get(value) or (0, 0))[TOKEN_AXIS]
    return from_data.get(value, np.full(count, value in graph.data_dependent))


def is_concat_of_tokens(graph: TokenGraph, node: ir.Node) -> bool:
    """Does a node, whose output is [batch, tokens, width], concatenate tokens?"""
    return graph.spec(node).kind == "concat" and int(node.attributes["axis"].value) % 3 == TOKEN_AXIS


def split_constant_tokens(
    positions: frozenset[int], read: set[int], count: int, fixed: bool
) -> tuple[int, tuple[TokenRange, ...]] | None:
    """(number of tokens in front that always stay; ranges of further ones behind them). ``read``: positions that the
    outputs read. ``fixed``: all inputs have ``count`` tokens; otherwise None where a range lies between tokens whose
    number differs."""
    leading = 0
    while leading in positions:
        leading += 1
    leading = max([leading, *(k + 1 for k in read)])
    ranges: list[TokenRange] = []
    for k in sorted(k for k in positions if k >= leading):
        if ranges and ranges[-1][1] == k:
            ranges[-1] = (ranges[-1][0], k + 1)
        else:
            ranges.append((k, k + 1))
    if ranges and ranges[-1][1] == count:
        ranges[-1] = (ranges[-1][0] - count, 0)
    if not fixed and any(start >= 0 for start, _ in ranges):
        return None
    return leading, tuple(ranges)
