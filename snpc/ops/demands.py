"""What operators demand of the sizes of their inputs: equal sizes, sizes that reach an index, multiples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from snpc.ops.names import GATHER, GATHER_ND, RESHAPE
from snpc.ops.spec import Blocked, OpCall, OpSpec
from snpc.types import Shape

LARGEST_STEP = 4096


@dataclass(frozen=True)
class SizeDemand:
    """A demand that a node makes and the sizes do not meet: ``size`` must equal ``other``, be at least that, or be a
    multiple of that."""

    kind: Literal["equal", "at least", "multiple"]
    size: int
    other: int


def unmet_demands(spec: OpSpec, call: OpCall) -> list[SizeDemand]:
    """The demands of a node that the known shapes of its inputs do not meet; empty for operators without a rule."""
    found: list[SizeDemand] = []
    if spec.kind == "pointwise" or spec.expands:
        found += _broadcast_demands(call, spec.expands)
    elif spec.kind == "concat":
        found += _concat_demands(call)
    elif spec.kind == "contraction" and spec.letters is not None:
        found += _contraction_demands(spec, call)
    elif (spec.domain, spec.name) == ("", RESHAPE):
        found += _reshape_demands(call)
    elif not spec.domain and spec.name in (GATHER, GATHER_ND, "GatherElements"):
        found += _index_demands(spec.name, call)
    return list(dict.fromkeys(found))


def _equal_demands(sizes: set[int]) -> Iterator[SizeDemand]:
    first, *others = sorted(sizes)
    yield from (SizeDemand("equal", first, other) for other in others)


def _broadcast_demands(call: OpCall, expands: bool) -> Iterator[SizeDemand]:
    shapes = [shape for shape in call.shapes if shape is not None]
    target = call.value(1) if expands else None
    if expands:
        shapes = [*shapes[:1], *([] if target is None else [tuple(int(n) for n in target.reshape(-1))])]
    for axis in range(1, max((len(shape) for shape in shapes), default=0) + 1):
        sizes = {shape[-axis] for shape in shapes if len(shape) >= axis} - {1}
        if len(sizes) > 1:
            yield from _equal_demands(sizes)


def _concat_demands(call: OpCall) -> Iterator[SizeDemand]:
    shapes = [shape for shape in call.shapes if shape is not None]
    if not shapes or len({len(shape) for shape in shapes}) > 1:
        return
    rank = len(shapes[0])
    for axis in set(range(rank)) - {int(call.attrs.get("axis", 1)) % max(rank, 1)}:
        sizes = {shape[axis] for shape in shapes}
        if len(sizes) > 1:
            yield from _equal_demands(sizes)


def _contraction_demands(spec: OpSpec, call: OpCall) -> Iterator[SizeDemand]:
    left, right = spec.operands
    if spec.letters is None or not (call.has(left) and call.has(right)):
        return
    try:
        letters = spec.letters(call)
    except (IndexError, Blocked):  # an operand of too low a rank, an equation that is not followed
        return
    if letters.windowed:
        return
    sizes: dict[str, set[int]] = {}
    for term, shape in ((letters.left, call.shape(left)), (letters.right, call.shape(right))):
        for letter, size in zip(term, shape, strict=False):
            sizes.setdefault(letter, set()).add(size)
    for letter, found in sizes.items():
        summed = letter not in letters.out
        found = found if summed else found - {1}
        if len(found) > 1:
            yield from _equal_demands(found)


def _reshape_demands(call: OpCall) -> Iterator[SizeDemand]:
    target = call.value(1)
    if target is None or not call.has(0):
        return
    shape = call.shape(0)
    copied = 0 if call.attrs.get("allowzero") else None
    wanted = [
        shape[axis] if n == 0 and copied is None and axis < len(shape) else int(n)
        for axis, n in enumerate(target.reshape(-1))
    ]
    total, given = math.prod(shape), math.prod(n for n in wanted if n != -1)
    if -1 in wanted:
        if given > 0 and total % given:
            yield from _step_demands(shape, given)
    elif total != given:
        yield from _count_demands(shape, wanted)


def _step_demands(shape: Shape, given: int) -> Iterator[SizeDemand]:
    """Each axis alone can make the number of entries a multiple of ``given``."""
    total = math.prod(shape)
    for size in dict.fromkeys(shape):
        step = given // math.gcd(given, total // size) if size else 0
        if 1 < step <= LARGEST_STEP:
            yield SizeDemand("multiple", size, step)


def _count_demands(shape: Shape, wanted: list[int]) -> Iterator[SizeDemand]:
    """Each axis alone can give the input the number of entries of the target; axes that differ may be equal."""
    if len(shape) == len(wanted):
        yield from (SizeDemand("equal", a, b) for a, b in zip(shape, wanted, strict=True) if a != b)
    total, given = math.prod(shape), math.prod(wanted)
    for size in dict.fromkeys(shape):
        rest = total // size if size else 0
        if rest and given % rest == 0 and given:
            yield SizeDemand("equal", size, given // rest)


def _index_demands(name: str, call: OpCall) -> Iterator[SizeDemand]:
    """Known indices must lie inside of the axes that they address."""
    indices = call.value(1)
    if indices is None or not call.has(0) or not indices.size or indices.dtype.kind not in "iu":
        return
    shape = call.shape(0)
    if name == GATHER_ND:
        batch = int(call.attrs.get("batch_dims", 0))
        per_axis = [(batch + k, indices[..., k]) for k in range(indices.shape[-1])]
    else:
        axis = int(call.attrs.get("axis", 0))
        per_axis = [(axis % len(shape) if shape else 0, indices)]
    for axis, positions in per_axis:
        needed = max(int(np.max(positions)) + 1, -int(np.min(positions)))  # in Python: the largest int64 plus one
        if axis < len(shape) and needed > shape[axis]:
            yield SizeDemand("at least", shape[axis], needed)
