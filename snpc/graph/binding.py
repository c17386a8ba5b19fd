"""Sizes for the dynamic dimensions of a graph's inputs."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping

import onnx_ir as ir


def dynamic_axes(graph: ir.Graph) -> list[tuple[str, str, int, int]]:
    """(dimension name, input name, axis, rank) of every dynamic axis of the graph's inputs."""
    found = []
    for value in graph.inputs:
        if value.shape is None or value.is_initializer():
            continue
        for axis, dim in enumerate(value.shape):
            if not isinstance(dim, int):
                name = dim.value if dim.value else f"{value.name}.{axis}"
                found.append((str(name), str(value.name), axis, len(value.shape)))
    return found


def candidate_dim_sizes(graph: ir.Graph, fixed: Mapping[str, int] | None = None) -> list[dict[str, int]]:
    """Candidate sizes for the dynamic dimensions, the most telling first (all different, then all alike)."""
    axes = dynamic_axes(graph)
    plain = {name: (axis, rank) for name, _, axis, rank in axes if re.fullmatch(r"[\w.:/-]+", name)}
    choices = []
    # The last pairs serve strided stacks: wide pictures, and audio, whose samples a front end divides by hundreds.
    for image, length in ((64, (7, 11, 13, 17)), (64, (8,)), (224, (7, 11, 13, 17)), (224, (8,)), (64, (2000,))):
        lengths = itertools.cycle(length)
        sizes = {}
        for name, (axis, rank) in plain.items():
            sizes[name] = 2 if axis == 0 else image if rank == 4 and axis >= 2 and "past" not in name else next(lengths)
        choices.append(sizes | dict(fixed or {}))
    unique: list[dict[str, int]] = []
    for sizes in choices:
        for name in dict.fromkeys(name for name, *_ in axes):
            sizes.setdefault(name, evaluate_dimension(name, sizes))
        if sizes not in unique:
            unique.append(sizes)
    return unique


def evaluate_dimension(text: str, sizes: Mapping[str, int]) -> int:
    """``past_sequence_length + 1`` with the sizes of the names in it; 8 where it cannot be read."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return max(1, _evaluate_arithmetic(tree, sizes))
    except (SyntaxError, KeyError, ValueError):
        return 8


def _evaluate_arithmetic(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp):
        left, right = _evaluate_arithmetic(tree.left, sizes), _evaluate_arithmetic(tree.right, sizes)
        if isinstance(tree.op, ast.Add):
            return left + right
        if isinstance(tree.op, ast.Sub):
            return left - right
        if isinstance(tree.op, ast.Mult):
            return left * right
        if isinstance(tree.op, ast.FloorDiv) and right:
            return left // right
    raise ValueError("not arithmetic over dimension names")


def alternative_dim_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Every dimension at another size, so that what differs between the two is dynamic."""
    return {name: size * 2 if size >= 32 else size + 3 for name, size in sizes.items()}
