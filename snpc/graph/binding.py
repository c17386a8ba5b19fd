"""Sizes for the dynamic dimensions of a graph's inputs."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping

import onnx_ir as ir


def dynamic_axes(graph: ir.Graph) -> list[tuple[str, str, int, int]]:
    """(dimension name, input name, axis, rank) of every dynamic axis of the graph's inputs."""
    axes = []
    for value in graph.inputs:
        if value.shape is None or value.is_initializer():
            continue
        for axis, dim in enumerate(value.shape):
            if not isinstance(dim, int):
                name = dim.value if dim.value else f"{value.name}.{axis}"
                axes.append((str(name), str(value.name), axis, len(value.shape)))
    return axes


def candidate_dim_sizes(graph: ir.Graph, fixed: Mapping[str, int] | None = None) -> list[dict[str, int]]:
    """Candidate sizes of the dynamic dimensions: all different first, which tells them apart, then all alike."""
    axes = dynamic_axes(graph)
    plain = {name: (axis, rank) for name, _, axis, rank in axes if re.fullmatch(r"[\w.:/-]+", name)}
    candidates = []
    # The last pairs serve strided stacks: large images, and audio, whose length a front end divides by hundreds.
    for image, length in ((64, (7, 11, 13, 17)), (64, (8,)), (224, (7, 11, 13, 17)), (224, (8,)), (64, (2000,))):
        lengths = itertools.cycle(length)
        dim_sizes = {}
        for name, (axis, rank) in plain.items():
            dim_sizes[name] = (
                2 if axis == 0 else image if rank == 4 and axis >= 2 and "past" not in name else next(lengths)
            )
        candidates.append(dim_sizes | dict(fixed or {}))
    unique: list[dict[str, int]] = []
    for dim_sizes in candidates:
        for name in dict.fromkeys(name for name, *_ in axes):
            dim_sizes.setdefault(name, evaluate_dimension(name, dim_sizes))
        if dim_sizes not in unique:
            unique.append(dim_sizes)
    return unique


def evaluate_dimension(text: str, dim_sizes: Mapping[str, int]) -> int:
    """The value of an expression such as ``past_sequence_length + 1``; 8 where it cannot be evaluated."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return max(1, _evaluate_arithmetic(tree, dim_sizes))
    except (SyntaxError, KeyError, ValueError):
        return 8


def _evaluate_arithmetic(tree: ast.expr, dim_sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return dim_sizes[tree.id]
    if isinstance(tree, ast.BinOp):
        left, right = _evaluate_arithmetic(tree.left, dim_sizes), _evaluate_arithmetic(tree.right, dim_sizes)
        if isinstance(tree.op, ast.Add):
            return left + right
        if isinstance(tree.op, ast.Sub):
            return left - right
        if isinstance(tree.op, ast.Mult):
            return left * right
        if isinstance(tree.op, ast.FloorDiv) and right:
            return left // right
    raise ValueError("not arithmetic over dimension names")


def alternative_dim_sizes(dim_sizes: Mapping[str, int]) -> dict[str, int]:
    """Another size for every dimension: what differs between the two depends on a dynamic dimension."""
    return {name: size * 2 if size >= 32 else size + 3 for name, size in dim_sizes.items()}
