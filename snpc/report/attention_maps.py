"""Attention maps: the attention weights of a vision model over the patches of a few pictures, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.ops import lookup
from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.pipeline import self_deciding_model
from snpc.planning import SlicePlan
from snpc.report.png import PixelArray
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import ARTIFACT_SUFFIXES, open_session
from snpc.runtime.io import load, save
from snpc.temporary import temporary_folder
from snpc.types import AnyArray, Feeds, FloatArray, Group

MAX_PICTURES = 2
MAX_LAYERS = 3  # the first, the last, and evenly spaced ones between
MAX_HEADS = 3  # per layer
PREFIX_TOKEN_COUNTS = range(9)  # class tokens and registers before the patches
MAX_PICTURE_SIDE = 112  # pixels

PatchGrid = tuple[int, int]


@dataclass(frozen=True)
class HeadMap:
    """Attention of one head over the grid of patches, as rows. Each map sums to 1."""

    group: str
    head: int
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]

    @property
    def overlap(self) -> float:
        """Fraction of the attention that is on the same patches before and after, in 0..1."""
        return float(np.minimum(self.before, self.after).sum())


@dataclass(frozen=True)
class AttentionPicture:
    """A calibration picture [height, width] of (red, green, blue), stretched to 0..255, and the maps on it."""

    pixels: tuple[tuple[tuple[int, int, int], ...], ...]
    maps: tuple[HeadMap, ...]


@dataclass(frozen=True)
class AttentionMaps:
    """``pictures`` is empty without maps, and ``reason`` says why. ``seen_from``: which queries the attention is of."""

    pictures: tuple[AttentionPicture, ...] = ()
    seen_from: str = ""
    reason: str = ""


class MapsUnavailable(Exception):
    """Says why there are no maps."""


def attention_maps(
    analysis: Analysis, path: Path, calibration: Calibration | None, plan: SlicePlan | None = None
) -> AttentionMaps:
    """Run the original and the file on the first calibration pictures, and compare the attention weights of a few
    heads. ``plan``: by which heads were cut, where it is known."""
    try:
        return compute_attention_maps(analysis, path, calibration, plan)
    except (MapsUnavailable, UserError) as error:
        return AttentionMaps(reason=str(error))


def compute_attention_maps(
    analysis: Analysis, path: Path, calibration: Calibration | None, plan: SlicePlan | None
) -> AttentionMaps:
    """The maps of a few heads on each picture. MapsUnavailable: says why there are none."""
    if path.suffix in ARTIFACT_SUFFIXES:
        raise MapsUnavailable(f"{path.name} is no ONNX file")
    if calibration is None:
        raise MapsUnavailable("there is no calibration data to show pictures of")
    feeds = first_samples(analysis, calibration)
    pictures = find_pictures(feeds)
    values = select_layers(find_attention_weights(analysis))
    known_types = analysis.traced_graph.facts.dtype
    types = {str(value.name): known_types.get(value) or ir.DataType.FLOAT for _, value in values}
    before = evaluate_values(self_deciding_model(analysis), types, feeds)
    after = evaluate_values(load(path).graph, types, feeds)
    count = min(MAX_PICTURES, len(pictures))
    maps: list[list[HeadMap]] = [[] for _ in range(count)]
    queries = set()
    for group, value in values:
        weights = [attention_per_head(w[str(value.name)], len(pictures)) for w in (before, after)]
        heads = match_heads(plan, group, weights)
        layout = patch_grid(weights[0].shape[-1], pictures.shape[1:3])
        same_tokens = weights[0].shape[-1] == weights[1].shape[-1]
        if layout is None or heads is None or not same_tokens or has_fewer_tokens(analysis, weights[0].shape[-1]):
            continue
        prefix, grid = layout
        queries.add(describe_queries(weights[0], prefix))
        for picture in range(count):
            for old, new in heads[:MAX_HEADS]:
                grids = [
                    attention_on_patches(w[picture, h], prefix, grid) for w, h in zip(weights, (old, new), strict=True)
                ]
                maps[picture].append(HeadMap(group.id, old, *(tuple(map(tuple, g.tolist())) for g in grids)))
    if not any(maps):
        raise MapsUnavailable("no attention weights over the patches of a picture were found")
    shown = (AttentionPicture(to_pixels(p), tuple(heads)) for p, heads in zip(pictures, maps, strict=False))
    return AttentionMaps(tuple(shown), " or ".join(sorted(queries)))


# -- inputs ----------------------------------------------------------------------------------------------------------


def first_samples(analysis: Analysis, calibration: Calibration) -> Feeds:
    """The first samples; a whole batch where the model takes no other size."""
    feeds = next(calibration.batches())
    dynamic = {spec.name for spec in analysis.model.inputs if spec.shape and not isinstance(spec.shape[0], int)}
    return {name: array[:MAX_PICTURES] if name in dynamic else array for name, array in feeds.items()}


def find_pictures(feeds: Feeds) -> FloatArray:
    """[pictures, height, width, channels] of the one input that looks like pictures. MapsUnavailable: there is none."""
    images = [a for a in feeds.values() if a.ndim == 4 and not np.issubdtype(a.dtype, np.integer)]
    channels_last = [a.transpose(0, 2, 3, 1) if a.shape[1] in (1, 3) else a for a in images]
    pictures = [a for a in channels_last if a.shape[3] in (1, 3)]
    if len(pictures) != 1:
        raise MapsUnavailable("the model takes no pictures")
    return np.asarray(pictures[0], np.float64)


def to_pixels(picture: FloatArray) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Average pooled to a small size and stretched to 0..255, as the normalization of the values is not known."""
    height, width, channels = picture.shape
    step = max(1, math.ceil(max(height, width) / MAX_PICTURE_SIDE))
    rows, columns = height // step, width // step
    small = picture[: rows * step, : columns * step].reshape(rows, step, columns, step, channels).mean((1, 3))
    span = float(small.max() - small.min()) or 1.0
    levels: PixelArray = np.round(255 * (small - small.min()) / span).astype(np.uint8)
    full = np.broadcast_to(levels, (rows, columns, 3)) if channels == 1 else levels
    return tuple(tuple((int(r), int(g), int(b)) for r, g, b in row) for row in full.tolist())


# -- attention weights-------------------------------------------------------------------------------------------------


def find_attention_weights(analysis: Analysis) -> list[tuple[Group, ir.Value]]:
    """The query/key groups, each with the attention weights that are computed from it."""
    values = {str(v.name): v for node in analysis.traced_graph.model.graph for v in node.outputs}
    pairs = []
    for group in analysis.groups:
        starts = [values[p.tensor] for p in group.probes if p.kind == "query" and p.tensor in values]
        weights = first_attention_weights(starts[0]) if group.role == "qk" and starts else None
        if weights is not None:
            pairs.append((group, weights))
    if not pairs:
        raise MapsUnavailable("no attention weights are values of the graph (inside fused nodes they cannot be seen)")
    return pairs


def first_attention_weights(start: ir.Value) -> ir.Value | None:
    """The nearest attention weights that are computed from a value, breadth first."""
    front, seen = [start], {start}
    while front:
        nodes = [use.node for value in front for use in value.uses()]
        for node in nodes:
            if lookup(node.domain, node.op_type).makes_shares:
                return node.outputs[0]
        front = [v for v in dict.fromkeys(v for node in nodes for v in node.outputs) if v not in seen]
        seen |= set(front)
    return None


def select_layers(pairs: Sequence[tuple[Group, ir.Value]]) -> list[tuple[Group, ir.Value]]:
    """At most ``MAX_LAYERS`` of the pairs, evenly spaced."""
    return [pairs[k] for k in np.unique(np.linspace(0, len(pairs) - 1, MAX_LAYERS).round().astype(int))]


def evaluate_values(model: ir.Model, types: Mapping[str, ir.DataType], feeds: Feeds) -> dict[str, AnyArray]:
    """The values that ``types`` names, computed by a model on ``feeds``."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    missing = [name for name in types if name not in values]
    if missing:
        raise MapsUnavailable(f"{missing[0]} is not in the pruned model")
    copy.graph.outputs.clear()
    for name in types:
        copy.graph.outputs.append(values[name])
    finalize(copy)
    for name, dtype in types.items():
        values[name].dtype = dtype
    with temporary_folder() as folder:
        path = folder / "exposed.onnx"
        save(copy, path)
        session = open_session(path, optimization="basic", memory="least")
        known = {i.name for i in session.get_inputs()}
        results = session.run(list(types), {k: v for k, v in feeds.items() if k in known})
    return dict(zip(types, results, strict=True))


# -- maps ------------------------------------------------------------------------------------------------------------


def attention_per_head(weights: AnyArray, samples: int) -> FloatArray:
    """Attention weights as [samples, heads, queries, keys]. The file may merge heads into the samples."""
    if weights.ndim == 3 and weights.shape[0] % samples == 0:
        weights = weights.reshape(samples, -1, *weights.shape[1:])
    if weights.ndim != 4 or weights.shape[0] != samples:
        raise MapsUnavailable("attention is not over the whole picture (in windows, say)")
    return np.asarray(weights, np.float64)


def match_heads(plan: SlicePlan | None, group: Group, weights: Sequence[FloatArray]) -> list[tuple[int, int]] | None:
    """(head before, the same head after) of all heads that are left; None where they cannot be matched."""
    old, new = (w.shape[1] for w in weights)
    if old == new:
        return [(k, k) for k in range(old)]
    if plan is None:
        return None
    for heads in plan.analysis.groups:
        same = heads.role == "head" and {s.tensor for s in group.sites} & {s.tensor for s in heads.sites}
        if same and (heads.size, plan.kept_width(heads)) == (old, new):
            return [(kept, k) for k, kept in enumerate(plan.keep[heads.id][0])]
    return None


def patch_grid(tokens: int, picture: Sequence[int]) -> tuple[int, PatchGrid] | None:
    """(tokens before the patches, (rows, columns) of patches) for ``picture``, (height, width)."""
    height, width = picture
    for prefix in PREFIX_TOKEN_COUNTS:
        rows = math.isqrt(max(tokens - prefix, 0) * height // width)
        columns = rows * width // height
        if rows >= 2 and rows * columns == tokens - prefix and rows * width == columns * height and rows <= height:
            return prefix, (rows, columns)
    return None


def has_fewer_tokens(analysis: Analysis, keys: int) -> bool:
    """Were patches dropped or merged before these keys, so that they form no grid?"""
    return analysis.reduction is not None and keys != analysis.tokens.points[0].count


def describe_queries(weights: FloatArray, prefix: int) -> str:
    """Whose attention ``attention_on_patches`` shows."""
    return "the class token" if prefix or weights.shape[2] == 1 else "all patches on average"


def attention_on_patches(weights: FloatArray, prefix: int, grid: PatchGrid) -> FloatArray:
    """Attention to the patches, normalized to sum 1: of the first token where one precedes the patches, else the mean
    over all queries. ``weights``: [queries, keys]."""
    row = weights[0] if prefix or len(weights) == 1 else weights.mean(0)
    patches = row[prefix:].reshape(grid)
    total = float(patches.sum())
    return patches / total if total > 0 else np.full(grid, 1 / patches.size)
