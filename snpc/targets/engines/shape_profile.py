"""Ranges of input shapes that an engine serves: given by the user, or derived from the dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.graph import choose_dim_sizes
from snpc.passes import SizedFacts, quoted_facts
from snpc.runtime.execution import check_shape
from snpc.runtime.io import load
from snpc.targets.base import BuildOptions
from snpc.types import Shape, TensorSpec

MAX_DERIVED_BATCH = 16  # of a derived range


@dataclass(frozen=True)
class ShapeRange:
    """Smallest shape of one input, the shape that is tuned for, and the largest, as in TensorRT."""

    min: Shape
    opt: Shape
    max: Shape


def shape_ranges(path: Path, options: BuildOptions) -> dict[str, ShapeRange]:
    """Input -> its shapes, for inputs with dynamic axes. Empty where there are none.

    Derived: batches of 1 to 16, tuned for 1; other axes from 1 up to what MACs are quoted at (128 where the model
    takes that). Of an input of which some shapes are given, the others are the nearest that is given, as in trtexec.
    """
    model = load(path)
    dynamic = [spec for spec in model.inputs if any(isinstance(dim, str) for dim in spec.shape)]
    requested = {**options.min_shapes, **options.opt_shapes, **options.max_shapes}
    unknown = sorted(set(requested) - {spec.name for spec in model.inputs})
    if unknown:
        raise UserError(
            f"a shape is given for {unknown[0]!r}: the inputs are {', '.join(s.name for s in model.inputs)}"
        )
    if not dynamic:
        if requested:
            raise UserError(
                f"{path.name}: no input has a dynamic axis: leave out --min-shapes, --opt-shapes, --max-shapes"
            )
        return {}
    quoted = quoted_facts(model.graph, SizedFacts(*choose_dim_sizes(model.graph)), {}).dim_sizes
    return {spec.name: range_from_options(spec, options) or default_range(spec, quoted) for spec in dynamic}


def range_from_options(spec: TensorSpec, options: BuildOptions) -> ShapeRange | None:
    minimum, optimum, maximum = (m.get(spec.name) for m in (options.min_shapes, options.opt_shapes, options.max_shapes))
    optimum = optimum or maximum or minimum
    if optimum is None:
        return None
    shape_range = ShapeRange(minimum or optimum, optimum, maximum or optimum)
    for shape in (shape_range.min, shape_range.opt, shape_range.max):
        check_shape(spec, shape)
    if any(not a <= b <= c for a, b, c in zip(shape_range.min, shape_range.opt, shape_range.max, strict=True)):
        raise UserError(f"input {spec.name!r}: shapes must grow from --min-shapes over --opt-shapes to --max-shapes")
    return shape_range


def default_range(spec: TensorSpec, quoted: Mapping[str, int]) -> ShapeRange:
    def size(axis: int, dim: int | str) -> int:
        return dim if isinstance(dim, int) else quoted.get(dim or f"{spec.name}.{axis}", 1)

    best = tuple(1 if k == 0 and isinstance(dim, str) else size(k, dim) for k, dim in enumerate(spec.shape))
    return ShapeRange(
        tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape),
        best,
        tuple(MAX_DERIVED_BATCH if k == 0 and isinstance(d, str) else best[k] for k, d in enumerate(spec.shape)),
    )
