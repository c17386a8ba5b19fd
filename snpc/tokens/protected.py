"""Tokens that always stay but are not the first ones: moved to the front of a stream before it is reduced, and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from snpc.passes.token_analysis import TokenRange
from snpc.tokens.methods import StepSettings
from snpc.tokens.writer import END_OF_AXIS, TokenGraphBuilder
from snpc.types import AnyArray


def ranges_in_new_order(settings: StepSettings) -> list[TokenRange]:
    """The ranges of the stream, in the order that they get: the leading tokens, the protected ones, all others."""
    moved = settings.protected
    front = settings.leading - sum(stop - start for start, stop in moved)
    starts = [front, *(stop for _, stop in moved if stop)]
    stops = [*(start for start, _ in moved), *([0] if not moved or moved[-1][1] else [])]
    gaps = [(start, stop) for start, stop in zip(starts, stops, strict=True) if start != stop or not stop]
    return [*([(0, front)] if front else []), *moved, *gaps]


def new_order(settings: StepSettings) -> AnyArray:
    """[count]: the position in the stream of every token in the new order."""
    every = np.arange(settings.count)
    return np.concatenate([every[start : stop or None] for start, stop in ranges_in_new_order(settings)])


def move_to_front(writer: TokenGraphBuilder, settings: StepSettings, value: ir.Value) -> ir.Value:
    """[B, N, ...] -> the same in the new order."""
    if not settings.protected:
        return value
    parts = (writer.slice(value, 1, start, stop or END_OF_AXIS) for start, stop in ranges_in_new_order(settings))
    return writer.concat(1, *parts)


def move_back(writer: TokenGraphBuilder, settings: StepSettings, value: ir.Value) -> ir.Value:
    """[B, N, ...] in the new order -> in that of the stream."""
    if not settings.protected:
        return value
    placed: list[tuple[int, int, TokenRange]] = []  # (position in the stream, ...)
    at = 0
    ranges = ranges_in_new_order(settings)
    for start, stop in ranges:
        known = stop - start if (start < 0) == (stop <= 0) else 0  # 0: to a place that is counted from the end
        placed.append((start if start >= 0 else END_OF_AXIS, at, (at, at + known if known else END_OF_AXIS)))
        at += known
    return writer.concat(1, *(writer.slice(value, 1, *where) for _, _, where in sorted(placed)))


__all__ = ["move_back", "move_to_front", "new_order"]
