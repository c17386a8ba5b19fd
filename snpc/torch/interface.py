"""Checks that a model and its teacher take the same inputs and give the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from snpc.errors import UserError
from snpc.types import Model, Shape, TensorSpec, shape_text


def check_same_interface(student: Model, dense: Model) -> None:
    """Raises UserError where inputs or outputs differ in name, type or shape. A dynamic size fits any."""
    for side in ("inputs", "outputs"):
        specs, dense_specs = getattr(student, side), getattr(dense, side)
        if len(specs) == len(dense_specs) and all(map(is_compatible, specs, dense_specs)):
            continue
        pair = next((a, b) for a, b in zip_longest(specs, dense_specs) if not (a and b and is_compatible(a, b)))
        mine, other = (describe_spec(spec) if spec is not None else "none" for spec in pair)
        raise UserError(
            f"{student.path}: its {side} are not those of {dense.path}: {mine} against {other}: the teacher is the "
            "model that was pruned"
        )


def is_compatible(a: TensorSpec, b: TensorSpec) -> bool:
    if (a.name, a.dtype, len(a.shape)) != (b.name, b.dtype, len(b.shape)):
        return False
    return all(x == y or isinstance(x, str) or isinstance(y, str) for x, y in zip(a.shape, b.shape, strict=True))


def describe_spec(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}{shape_text(spec.shape)}"


def check_same_shapes(student: Model, dense: Model, shapes: Mapping[str, tuple[Shape, Shape]]) -> None:
    """Raises UserError where outputs of dynamic sizes turn out to differ."""
    for name, (own, expected) in shapes.items():
        if own != expected:
            raise UserError(
                f"{student.path}: its output {name} has the shape {list(own)}, that of {dense.path} {list(expected)}: "
                "the teacher is the model that was pruned"
            )
