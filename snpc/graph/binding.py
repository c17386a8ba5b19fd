"""Sizes for the dynamic dimensions of a graph's inputs."""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

LEADING_SIZES = (2, 3, 5)
# Coprime, and no sum of two of them is the sum of two others: a size says which dimensions it is made of.
LENGTHS = (7, 11, 13, 19, 29, 37, 43, 59)


@dataclass(frozen=True)
class DimRelation:
    """A size that follows from others: the sum of those of ``terms`` (a name may be there twice) and ``offset``."""

    terms: tuple[str, ...] = ()
    offset: int = 0

    def size(self, sizes: Mapping[str, int]) -> int:
        return sum(sizes[term] for term in self.terms) + self.offset


class DimSizes(dict[str, int]):
    """Sizes of dynamic dimensions by name, and what the graph demands of them.

    ``relations``: sizes that follow from others; ``steps``: sizes are multiples of these.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        relations: Mapping[str, DimRelation] | None = None,
        steps: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(sizes)
        self.relations: dict[str, DimRelation] = dict(relations or {})
        self.steps: dict[str, int] = dict(steps or {})

    def resized(self, wanted: Mapping[str, int], fixed: Iterable[str] = ()) -> DimSizes:
        """These sizes with the ``wanted`` ones instead, as far as relations and steps allow; ``fixed`` ones as they
        are wanted."""
        keep = set(fixed)
        sizes = {name: wanted.get(name, size) for name, size in self.items()}
        for name, step in self.steps.items():
            if name not in keep and sizes[name]:
                sizes[name] = math.ceil(sizes[name] / step) * step
        for name in keep & set(self.relations):
            self._meet(name, sizes, keep)
        for _ in self.relations:  # a relation may read another one's result
            sizes |= {name: max(r.size(sizes), 0) for name, r in self.relations.items() if name not in keep}
        return DimSizes(sizes, self.relations, self.steps)

    def _meet(self, name: str, sizes: dict[str, int], fixed: set[str]) -> None:
        """Change a term of the relation of ``name``, so that its sum is the size that ``name`` has."""
        relation = self.relations[name]
        free = [term for term in relation.terms if term not in fixed and relation.terms.count(term) == 1]
        rest = sizes[name] - relation.size(sizes)
        for term in reversed(free):
            if sizes[term] + rest >= 0:
                sizes[term] += rest
                return

    def extended(self, others: Mapping[str, int]) -> DimSizes:
        """These sizes and those of dimensions beside them."""
        return DimSizes({**self, **others}, self.relations, self.steps)

    def constant(self, names: Iterable[str], size: int) -> DimSizes:
        """These sizes, with those of ``names`` fixed at ``size``."""
        relations = {name: DimRelation((), size) for name in names if name in self}
        sizes = {**self, **dict.fromkeys(relations, size)}
        return DimSizes(sizes, {**self.relations, **relations}, self.steps).resized({})

    def loosened(self) -> DimSizes:
        """These sizes without the demands that give one a number: only sums of others are kept."""
        return DimSizes(self, {name: relation for name, relation in self.relations.items() if relation.terms})

    def related(self, name: str, relation: DimRelation) -> DimSizes | None:
        """These sizes with one relation more; None where it would make a circle."""
        terms: list[str] = []
        offset = relation.offset
        for term in relation.terms:
            known = self.relations.get(term)
            terms += known.terms if known else [term]
            offset += known.offset if known else 0
        if name in terms:
            return None
        relations = {**self.relations, name: DimRelation(tuple(terms), offset)}
        for other, known in self.relations.items():
            if name in known.terms:
                relations[other] = DimRelation(
                    tuple(t for term in known.terms for t in (terms if term == name else [term])),
                    known.offset + offset * known.terms.count(name),
                )
        return DimSizes(self, relations, self.steps).resized({})

    def stepped(self, name: str, step: int) -> DimSizes:
        """These sizes, with that of ``name`` a multiple of ``step`` too."""
        return DimSizes(self, self.relations, {**self.steps, name: math.lcm(step, self.steps.get(name, 1))}).resized({})


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


def leading_dims(graph: ir.Graph) -> set[str]:
    """Names of first axes: batches. The name of a vector's only axis is none where it is an inner axis elsewhere."""
    axes = dynamic_axes(graph)
    inner = {name for name, _, axis, _ in axes if axis}
    return {name for name, _, axis, rank in axes if axis == 0 and (rank > 1 or name not in inner)}


def past_dims(graph: ir.Graph) -> set[str]:
    """Names of inner axes that only past keys and values have."""
    axes = [axis for axis in dynamic_axes(graph) if axis[2]]
    past = {name for name, value, _, _ in axes if "past" in value.lower() or "cache" in value.lower()}
    return past - {name for name, value, _, _ in axes if not ("past" in value.lower() or "cache" in value.lower())}


def base_dim_sizes(graph: ir.Graph) -> list[DimSizes]:
    """Sizes to start from: all different first, which tells dimensions apart, then all alike.

    A name that is an expression over others, such as ``past_sequence_length + sequence_length``, follows from them.
    One that is a multiple of something unknown, such as ``14*rows``, is a size of its own with that step.
    """
    axes, leading = dynamic_axes(graph), leading_dims(graph)
    plain: dict[str, tuple[int, int]] = {}
    steps = multiples({name for name, *_ in axes})
    for name, _, axis, rank in axes:
        if name in steps or re.fullmatch(r"[\w.:/-]+", name):
            plain.setdefault(name, (axis, rank))
    found: list[DimSizes] = []
    # The last pairs serve strided stacks: large images, and audio, whose length a front end divides by hundreds.
    for image, length in ((64, LENGTHS), (64, (8,)), (224, LENGTHS), (224, (8,)), (64, (2000,))):
        lengths = itertools.cycle(length)
        firsts = itertools.cycle(LEADING_SIZES if len(length) > 1 else LEADING_SIZES[:1])
        sizes = {}
        for name, (axis, rank) in plain.items():
            picture = rank == 4 and axis >= 2 and "past" not in name
            sizes[name] = next(firsts) if name in leading else image if picture else next(lengths)
        dim_sizes = _with_expressions(sizes, dict.fromkeys(name for name, *_ in axes))
        for name, step in steps.items():
            dim_sizes = dim_sizes.stepped(name, step)
        if dim_sizes not in found:
            found.append(dim_sizes)
    return found


def multiples(names: set[str]) -> dict[str, int]:
    """Name -> k, of names such as ``14*rows`` or ``rows*14``, as torch.export calls multiples, where ``rows`` is no
    dimension itself."""
    found = {}
    for name in sorted(names):
        match = re.fullmatch(r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)(?:\s*\*\s*(\d+))?", name)
        step = int(match[1] or 1) * int(match[3] or 1) if match is not None else 1
        if match is not None and step > 1 and match[2] not in names:
            found[name] = step
    return found


def _with_expressions(sizes: dict[str, int], names: Iterable[str]) -> DimSizes:
    relations = {}
    for name in names:
        if name in sizes:
            continue
        terms = re.split(r"\s*\+\s*", name.strip())
        if all(term in sizes or term.isdecimal() for term in terms):
            parts = tuple(term for term in terms if not term.isdecimal())
            relations[name] = DimRelation(parts, sum(int(term) for term in terms if term.isdecimal()))
        sizes[name] = evaluate_dimension(name, sizes)
    return DimSizes(sizes, relations).resized({})


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
    """Another size for every dimension: what differs between the two depends on a dynamic dimension.

    Relations between the sizes hold for the others too, and a size that the graph fixes stays.
    """
    known = dim_sizes if isinstance(dim_sizes, DimSizes) else DimSizes(dim_sizes)
    wanted = {}
    for name, size in dim_sizes.items():
        step = known.steps.get(name)
        wanted[name] = size + step if step else size * 2 if size >= 32 else size + 3
    return known.resized(wanted)


def coprime_dim_sizes(dim_sizes: DimSizes, leading: set[str]) -> DimSizes:
    """Other small sizes for every dimension that is free: coprime to these and to each other, so that what holds at
    both holds by no coincidence of sizes. Multiples of a step, and pictures, get the next larger size instead."""
    wanted: dict[str, int] = {}
    for name, size in dim_sizes.items():
        if name in dim_sizes.steps:
            wanted[name] = size + dim_sizes.steps[name]
        elif size >= 32:
            wanted[name] = size * 3 // 2
        elif name not in dim_sizes.relations:
            taken = (*(n for dim, n in dim_sizes.items() if dim not in dim_sizes.relations), *wanted.values())
            counted = itertools.count(3 if name in leading else 5)
            wanted[name] = next(n for n in counted if all(math.gcd(n, other) < 2 for other in taken))
    return dim_sizes.resized(wanted)
