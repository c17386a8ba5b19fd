"""Shapes that inference cannot know, read from one run of the graph. Whoever can run a graph registers how.

Operators without a shape rule, and sizes that depend on data, leave the shape of their outputs unknown, and with it all
shapes behind them. Only shapes are asked for, so no activation is kept.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from snpc.types import Shape


@dataclass(frozen=True)
class MeasuredValue:
    """What a run showed of a value. ``dtype`` None: nobody asked, as inference knows it."""

    shape: Shape
    dtype: ir.DataType | None = None


class ShapeSource(Protocol):
    """Runs ``model`` once and returns the shapes of ``values``, and the types of those of them that are ``untyped``.

    ``inputs``: the shape of every graph input, by name. Values that the run does not show are left out; all are, where
    the model does not run.
    """

    def __call__(
        self, model: ir.Model, values: Sequence[ir.Value], untyped: Container[ir.Value], inputs: Mapping[str, Shape]
    ) -> Mapping[ir.Value, MeasuredValue]: ...


_shape_sources: list[ShapeSource] = []  # at most one: the latest


def register_shape_source(source: ShapeSource) -> None:
    """Ask ``source`` for unknown shapes from now on."""
    _shape_sources[:] = [source]


def measure_shapes(
    model: ir.Model, values: Sequence[ir.Value], untyped: Container[ir.Value], inputs: Mapping[str, Shape]
) -> Mapping[ir.Value, MeasuredValue]:
    """What the registered ``ShapeSource`` returns; nothing where nobody can run a graph."""
    return _shape_sources[0](model, values, untyped, inputs) if _shape_sources and values else {}
