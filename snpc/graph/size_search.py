"""Solves for sizes of dynamic dimensions that a graph takes, from what its nodes demand.

Sizes that are all different tell dimensions apart: where two sizes must be equal and are not, each says which
dimensions it is made of, so that a demand such as 11 = 20 becomes ``total = past + sequence``.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from snpc.graph.binding import DimRelation, DimSizes, base_dim_sizes, leading_dims, past_dims
from snpc.graph.shapes import ShapeFacts, infer_graph, infer_node, initial_facts, opset_version
from snpc.ops import SizeDemand, lookup, unmet_demands

MOST_INFERENCES = 24
MOST_DEMANDS = 8  # that are not met: then the sizes are given up
MOST_SECONDS = 10.0  # after which no further sizes are inferred at
MOST_TRIED_CONSTANTS = 12
POWERS = (4, 8, 16, 32, 64, 128, 256, 512)
LARGEST_LENGTH = 2048
LARGEST_TRIED = 1024


@dataclass(frozen=True)
class SizedShapes:
    """Sizes of dynamic dimensions with the shapes there, and how badly they fit: (what is contradicted or unknown,
    names of outputs that do not hold). ``partial``: so badly that not all nodes were looked at."""

    dim_sizes: DimSizes
    facts: ShapeFacts
    misfit: tuple[int, int]
    demands: tuple[SizeDemand, ...]
    partial: bool = False


def choose_dim_sizes(model: ir.Model, given: Mapping[str, int] | None = None) -> tuple[DimSizes, ShapeFacts]:
    """The sizes of dynamic dimensions at which the graph contradicts itself least and most shapes are known, with the
    facts there. ``given``: sizes to try too, where small ones do not fit."""
    best: SizedShapes | None = None
    start, seen = time.monotonic(), list[DimSizes]()
    queue = deque(base_dim_sizes(model.graph))
    first = queue[0]
    if given:
        queue.append(first.resized(given, given))
    while queue and (best is None or (len(seen) < MOST_INFERENCES and time.monotonic() - start < MOST_SECONDS)):
        dim_sizes = queue.popleft()
        if dim_sizes in seen:
            continue
        seen.append(dim_sizes)
        found = _sized_shapes(model, dim_sizes)
        if dim_sizes is first and found.demands:  # it contradicts itself: small lengths come before large ones
            queue.extendleft(reversed([*itertools.islice(queue, 1), *_alike(model.graph, first)]))
        if best is None or found.misfit < best.misfit:
            best = found
            queue.extendleft(reversed(list(relate(model.graph, dim_sizes, found.demands, {}))))
        if best.misfit == (0, 0):
            break
    assert best is not None
    best = _relaxed(model, best)
    unknown = best.partial or any(shape is None for shape in best.facts.shape.values())
    return best.dim_sizes, infer_graph(model, best.dim_sizes) if unknown else best.facts


def _relaxed(model: ir.Model, found: SizedShapes) -> SizedShapes:
    """A size that the graph takes doubled too is not fixed: it is a multiple of that number."""
    for name, relation in found.dim_sizes.relations.items():
        if relation.terms or relation.offset < 2:
            continue
        relations = {other: known for other, known in found.dim_sizes.relations.items() if other != name}
        steps = {**found.dim_sizes.steps, name: relation.offset}
        relaxed = DimSizes(found.dim_sizes, relations, steps)
        doubled = _sized_shapes(model, relaxed.resized({name: 2 * relation.offset}))
        if doubled.misfit <= found.misfit:
            found = replace(found, dim_sizes=relaxed)
    return found


def _sized_shapes(model: ir.Model, dim_sizes: DimSizes) -> SizedShapes:
    facts = initial_facts(model, dim_sizes)
    demands: list[SizeDemand] = []
    nodes = iter(model.graph)
    for node in nodes:
        infer_node(facts, node, model, dim_sizes)
        spec = lookup(node.domain, node.op_type)
        # Inference itself finds operands that do not fit; it lets pass a Reshape or an index that does not.
        if node in facts.problems or spec.kind == "movement":
            demands += unmet_demands(spec, facts.call(node, opset_version(model, node.domain)))
        if len(demands) > MOST_DEMANDS:
            break
    left = len(list(nodes))
    missing = left + sum(1 for shape in facts.shape.values() if shape is None)
    misnamed = _declared_sums(model.graph, dim_sizes, facts)
    misfit = (len(demands) + missing, len(misnamed))
    return SizedShapes(dim_sizes, facts, misfit, (*demands, *misnamed), left > 0)


def _declared_sums(graph: ir.Graph, dim_sizes: DimSizes, facts: ShapeFacts) -> list[SizeDemand]:
    """Output axes that bear the name of an input's axis and have the size of two others together."""
    sums = {a + b for a, b in itertools.combinations(set(dim_sizes.values()), 2)}
    found = set()
    for value in graph.outputs:
        for dim, size in zip(value.shape or (), facts.shape.get(value) or (), strict=False):
            known = None if isinstance(dim, int) else dim_sizes.get(str(dim.value))
            if known is not None and known != size and size in sums:
                found.add(SizeDemand("equal", known, size))
    return sorted(found, key=lambda demand: (demand.size, demand.other))


def relate(
    graph: ir.Graph, dim_sizes: DimSizes, demands: Sequence[SizeDemand], fixed: Mapping[str, int]
) -> Iterator[DimSizes]:
    """Sizes that would meet the most frequent demands, the likeliest first."""
    leading = leading_dims(graph)
    for demand, _ in Counter(demands).most_common(4):
        sides = [(demand.size, demand.other), (demand.other, demand.size)]
        for size, other in sides if demand.kind == "equal" else sides[:1]:
            names = [n for n, s in dim_sizes.items() if s == size and n not in fixed and n not in dim_sizes.relations]
            for name in sorted(names, key=lambda name: name in leading):
                if demand.kind == "multiple":
                    yield dim_sizes.stepped(name, other)
                    continue
                alike = [n for n in dim_sizes if n != name and (n in leading) == (name in leading)]
                for relation in _ways_to_write(other, dim_sizes, alike):
                    related = dim_sizes.related(name, relation)
                    if related is not None:
                        yield related


def _ways_to_write(value: int, dim_sizes: DimSizes, names: Sequence[str]) -> Iterator[DimRelation]:
    """Expressions over the sizes of ``names`` that have this value: a size, a sum of two, a multiple, one and a little,
    a number."""
    free = {name: dim_sizes[name] for name in names if name not in dim_sizes.relations}
    yield from (DimRelation((name,)) for name, size in free.items() if size == value)
    for (one, size), (two, other) in itertools.combinations(free.items(), 2):
        if size + other == value:
            yield DimRelation((one, two))
    for factor in (2, 3, 4):
        yield from (DimRelation((name,) * factor) for name, size in free.items() if size * factor == value)
    for offset in (1, -1, 2):
        yield from (DimRelation((name,), offset) for name, size in free.items() if size + offset == value)
    if 0 < value <= LARGEST_LENGTH:
        yield DimRelation((), value)


def trial_dim_sizes(
    graph: ir.Graph, chosen: DimSizes, fixed: Mapping[str, int], told: Sequence[int]
) -> Iterator[DimSizes]:
    """Sizes to try on a runtime, the likeliest first: those ``chosen``, batch 1, no past, lengths all alike (powers of
    two, constants of the graph), each with the relations that are known.

    ``told``: numbers in the last failure's message, which often are a size that was given and one that was wanted; the
    caller changes them between two sizes.
    """
    seen: list[DimSizes] = []
    pending = deque(_untold_sizes(graph, chosen))
    while pending:
        dim_sizes = pending.popleft().resized(fixed, fixed)
        if dim_sizes in seen:
            continue
        seen.append(dim_sizes)
        yield dim_sizes
        demands = [SizeDemand("equal", a, b) for a, b in itertools.permutations(dict.fromkeys(told), 2)]
        pending.extendleft(reversed(list(relate(graph, dim_sizes, demands, fixed))[:6]))


def _untold_sizes(graph: ir.Graph, chosen: DimSizes) -> Iterator[DimSizes]:
    leading, past = leading_dims(graph), past_dims(graph)
    yield chosen
    yield chosen.constant(leading, 1)
    if past:
        yield chosen.constant(past, 0)
        yield chosen.constant(leading, 1).constant(past, 0)
    yield from (chosen.constant(leading, size) for size in POWERS[:2])
    loose = chosen.loosened()
    yield from _followed_by_sum(loose, graph)
    yield from _alike(graph, loose)
    yield from base_dim_sizes(graph)


def _alike(graph: ir.Graph, chosen: DimSizes) -> Iterator[DimSizes]:
    """All lengths the same: numbers that constants of the graph name, and powers of two, from small to large."""
    leading = leading_dims(graph)
    inner = [name for name in chosen if name not in leading and name not in chosen.relations]
    for length in sorted({*_graph_constants(graph), *POWERS}):
        alike = chosen.resized(dict.fromkeys(inner, length))
        yield DimSizes(alike, alike.relations, {**alike.steps, **dict.fromkeys(inner, length)})


def _followed_by_sum(chosen: DimSizes, graph: ir.Graph) -> Iterator[DimSizes]:
    """A mask of past and new tokens has a length of its own: any length may be the sum of two others."""
    leading = leading_dims(graph)
    inner = [name for name in chosen if name not in leading and name not in chosen.relations]
    for name in inner:
        for pair in itertools.combinations([other for other in inner if other != name], 2):
            related = chosen.related(name, DimRelation(pair))
            if related is not None and len(inner) <= 4:
                yield related


def _graph_constants(graph: ir.Graph) -> list[int]:
    """Sizes that constants of the graph and declared shapes name, the most frequent first."""
    counts: Counter[int] = Counter()
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size <= 8 and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            counts.update(int(n) for n in tensor.numpy().reshape(-1))
    for node in graph:
        for value in node.outputs:
            counts.update(dim for dim in value.shape or () if isinstance(dim, int))
    sizes = [n for n, _ in counts.most_common() if 3 < n <= LARGEST_TRIED]
    return sizes[:MOST_TRIED_CONSTANTS]
