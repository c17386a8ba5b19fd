"""Affine maps that can stand for attention layers, fitted in closed form to what the layers add on calibration data.

y = (x U + mean(x) M + first(x) F) V + b for the tokens x that a layer reads. Least squares fall apart: how y varies
within a sample decides on A = U V, how its mean varies between samples on M and F, for which there are as many rows as
samples, and so a ridge of their own. V [r, D] spans what varies most of the fitted outputs (reduced-rank regression): a
quarter of the width is nearly as good as all of it (docs/design-notes.md). A causal layer, whose mean would look
ahead, and one with padded tokens, or with tokens that get fewer, map every token by itself, by how y varies over all
rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, make_node, redirect_uses
from snpc.ops import names as op
from snpc.passes import Analysis
from snpc.passes.sublayers import Substitute, TokenMap, maps_tokens
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import Regression, choose_ridge
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.sensitivity.layer_trials import batch_and_tokens
from snpc.runtime.statistics import Instrument, find_padding, token_mask_runner
from snpc.types import AnyArray, Feeds, FloatArray, Sublayer

RANK_SHARE = 4  # a map has a quarter of its narrower side between its two matrices
READ, ADDED, COUNT = "snpc_read_", "snpc_added_", "snpc_count_"  # outputs, by the number of a layer
MOVED = 1e-4  # of what a layer adds: more than rounding


def fit_layer_maps(
    analysis: Analysis,
    sublayers: Iterable[Sublayer],
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, Substitute]:
    """Name -> the map that stands for an attention layer; layers that the data says nothing of have none."""
    source = analysis.traced_graph
    attentions, shapes = [s for s in sublayers if s.kind == "attention"], source.facts.shapes_by_name
    mapped = [s for s in attentions if maps_tokens(shapes.get(s.read, ()), shapes.get(s.branch, ()))]
    if not mapped:
        return {}
    padding = find_padding(source, [(s.branch, batch_and_tokens) for s in mapped])
    instrument = Instrument(source.model, padding.row_masks)
    for number, sublayer in enumerate(mapped):
        mask = instrument.row_mask(sublayer.branch)
        values = [instrument.cast_float32(instrument.values[name]) for name in (sublayer.read, sublayer.branch)]
        shown = {READ: values[0], ADDED: values[1], COUNT: instrument.ones_column(values[1], mask)}
        for what, value in shown.items():
            instrument.add_output(instrument.zero_masked(value, mask), f"{what}{number}")
    sums = [TokenSums() for _ in mapped]
    batches = execution.track("layer maps", calibration.batches(), len(calibration.batch_plan))
    with (
        token_mask_runner(source, padding, execution) as masks,
        temporary_session(instrument.model, execution=execution) as run,
    ):
        for feeds in batches:
            found = run({**feeds, **masks(feeds)})
            for number, total in enumerate(sums):
                total.add(*(found[f"{what}{number}"] for what in (READ, ADDED, COUNT)))
    unpadded = [s for s in mapped if s.branch not in padding.row_masks and analysis.reduction is None]
    pooled = set[str]()
    if unpadded:
        pooled = layers_that_look_ahead(analysis, unpadded, next(iter(calibration.batches())), execution)
    maps = {s.name: total.fit(s.read, s.name in pooled) for s, total in zip(mapped, sums, strict=True)}
    return {name: substitute for name, substitute in maps.items() if substitute is not None}


def layers_that_look_ahead(
    analysis: Analysis, sublayers: Sequence[Sublayer], feeds: Feeds, execution: Execution = DEFAULT_EXECUTION
) -> set[str]:
    """Names of the layers in which what is added to the first tokens of a sample depends on its last one."""
    model = analysis.traced_graph.model.clone()
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values |= {str(value.name): value for value in model.graph.inputs}
    graph = analysis.sublayer_graph
    for sublayer in sublayers:
        inside = {str(node.name) for node in graph.inside(graph.branches[sublayer.name])}
        read = values[sublayer.read]
        uses = [(use.node, use.idx) for use in read.uses() if str(use.node.name) in inside]
        switch = ir.Value(name=flip_name(sublayer), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        model.graph.inputs.append(switch)
        first = min((node for node, _ in uses), key=list(model.graph).index)
        added = replace_last_token(model.graph, read, switch)
        model.graph.insert_before(first, added)
        redirect_uses(uses, added[-1].outputs[0])
    instrument = Instrument(model)
    instrument.add_values([s.branch for s in sublayers], analysis.traced_graph.facts.types_by_name)
    off = {flip_name(sublayer): np.array(False) for sublayer in sublayers}
    with temporary_session(instrument.model, execution=execution) as run:
        whole = run({**feeds, **off})
        flipped = {s.branch: run({**feeds, **off, flip_name(s): np.array(True)})[s.branch] for s in sublayers}
    moved = {name: np.abs(array[:, :-1] - whole[name][:, :-1]).max(initial=0) for name, array in flipped.items()}
    return {s.name for s in sublayers if moved[s.branch] > MOVED * np.abs(whole[s.branch]).max()}


def flip_name(sublayer: Sublayer) -> str:
    """The input that says whether this layer reads its first token in place of the last one."""
    return f"snpc_flip_{sublayer.name}"


def replace_last_token(graph: ir.Graph, read: ir.Value, switch: ir.Value) -> list[ir.Node]:
    """Nodes whose last one gives ``read`` [batch, tokens, n], with the first token in place of the last if
    ``switch``."""
    zero, one, last = (add_constant(graph, np.array([k]), f"{switch.name}_{k}") for k in (0, 1, -1))
    before = make_node(op.SLICE, [read, zero, last, one], name=f"{switch.name}_before")
    first = make_node(op.SLICE, [read, zero, one, one], name=f"{switch.name}_first")
    joined = make_node(op.CONCAT, [before.outputs[0], first.outputs[0]], {"axis": 1}, name=f"{switch.name}_concat")
    chosen = make_node(op.WHERE, [switch, joined.outputs[0], read], name=f"{switch.name}_where")
    return [before, first, joined, chosen]


@dataclass
class TokenSums:
    """Of the tokens x that a layer reads and what it adds to them, y. ``squares`` [n, n] and ``products`` [n, D]: sums
    of x x' and x y' over the samples with an even and an odd number. Of each sample: its number of tokens, the mean of
    x, its first x, and the mean of y."""

    squares: list[FloatArray] = field(default_factory=list)
    products: list[FloatArray] = field(default_factory=list)
    samples: list[tuple[float, FloatArray, FloatArray, FloatArray]] = field(default_factory=list)

    def add(self, x: AnyArray, y: AnyArray, count: AnyArray) -> None:
        """[batch, tokens, n], [batch, tokens, D] and [batch, tokens, 1], nil in rows that do not count."""
        if not self.squares:
            self.squares = [np.zeros((x.shape[-1], x.shape[-1])) for _ in range(2)]
            self.products = [np.zeros((x.shape[-1], y.shape[-1])) for _ in range(2)]
        for tokens, added, counted in zip(x, y, count, strict=True):
            half, number = len(self.samples) % 2, max(float(counted.sum()), 1.0)
            self.squares[half] += tokens.T @ tokens
            self.products[half] += tokens.T @ added
            means = (np.asarray(part.sum(0, dtype=np.float64) / number) for part in (tokens, added))
            mean, mean_added = means
            self.samples.append((number, mean, tokens[0].astype(np.float64), mean_added))

    def fit(self, read: str, pooled: bool) -> Substitute | None:
        """The map by least squares; None where it predicts no better than the mean."""
        count, mean, first, added = (np.array(part) for part in zip(*self.samples, strict=True))
        shares = count / count.sum()
        center, center_added = shares @ mean, shares @ added
        halves = [np.arange(len(count)) % 2 == half for half in range(2)]

        def between(x: FloatArray, y: FloatArray) -> list[Regression]:
            """How means of samples vary, in either half."""
            weighed = [x[half].T * count[half] for half in halves]
            return [Regression(w @ x[half], w @ y[half]) for w, half in zip(weighed, halves, strict=True)]

        about_zero = between(mean, added)
        parts = [Regression(*sums) - b for *sums, b in zip(self.squares, self.products, about_zero, strict=True)]
        if not pooled:
            parts = [p + b for p, b in zip(parts, between(mean - center, added - center_added), strict=True)]
        ridge = choose_ridge(parts)
        weight = (parts[0] + parts[1]).solve(ridge.ridge)
        spread = weight.T @ (parts[0] + parts[1]).moment @ weight
        pools = np.zeros((2 * len(weight), len(center_added)))
        both = np.concatenate([mean, first], 1)
        if pooled:
            rest = added - mean @ weight
            regressions = between(both - shares @ both, rest - shares @ rest)
            pool_ridge = choose_ridge(regressions)
            pooled = pool_ridge.beats_mean
            pools = (regressions[0] + regressions[1]).solve(pool_ridge.ridge)
            moved = (mean - center) @ weight + (both - shares @ both) @ pools
            spread += moved.T * count @ moved
        if not (ridge.beats_mean or pooled):
            return None
        rank = map_rank(*weight.shape)
        basis = np.linalg.eigh(spread)[1][:, : -rank - 1 : -1]
        bias = center_added - (center @ weight + shares @ both @ pools) @ basis @ basis.T
        reduce, expand, pool = (part.astype(np.float32) for part in (weight @ basis, basis.T, pools @ basis))
        return Substitute(bias, TokenMap(read, reduce, expand, pool.reshape(2, -1, rank) if pooled else None))


def map_rank(read: int, added: int) -> int:
    """Columns between the two matrices of a map, a multiple of eight where that is possible."""
    rank = max(min(read, added) // RANK_SHARE, 1)
    return rank - rank % 8 if rank >= 8 else rank
