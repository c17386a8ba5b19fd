"""Padded tokens do not count in statistics: finds the rows of a probe that belong to tokens which nothing attends to.

Where an attention takes a mask that depends on the inputs, a key without weight for any query of any head is padding,
and so is the row of that token in every probe of the same token stream (``token_analysis.padding_sources``). Where the
tokens of a probe's rows are unknown, all rows count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from snpc.graph import ShapeFacts, alternative_dim_sizes, infer_graph
from snpc.ops import ATTENTION_FORMS
from snpc.passes.grouping import TracedGraph
from snpc.passes.token_analysis import PaddingSource, TokenStreams, find_token_streams
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.probe_layout import RowMask, RowOrder, infer_probe_layout, samples_and_rows
from snpc.types import AnyArray, Feeds, Probe, Shape

MIN_ATTENTION_WEIGHT = 1e-9  # weights above it are not zero
MASKED_SCORE = -1e3  # what a mask adds to the score of a hidden key is below it

TokenMask = npt.NDArray[np.bool_]
TokenMasks = Mapping[str, TokenMask]
RowCounter = Callable[[Shape], tuple[int, int]]
"""From the shape of a tensor to (samples, rows of each)."""


@dataclass(frozen=True)
class PaddingMasks:
    """``row_masks``: tensor -> which input masks its rows; ``sources``: input name -> the value that it is computed
    from."""

    row_masks: Mapping[str, RowMask] = field(default_factory=dict)
    sources: Mapping[str, PaddingSource] = field(default_factory=dict)

    @property
    def reading(self) -> MaskReading:
        """How the masks are read from what the graph computes."""
        return MaskReading({name: source.kind == "weights" for name, source in self.sources.items()})


def find_padding(traced_graph: TracedGraph, tensors: Iterable[tuple[str, RowCounter]]) -> PaddingMasks:
    """The masks of these (tensor, how its rows are counted), for tensors whose padding the graph shows."""
    streams = find_token_streams(traced_graph)
    if not streams.sources:
        return PaddingMasks()
    dim_sizes = alternative_dim_sizes(traced_graph.dim_sizes)
    facts_at_sizes = [traced_graph.facts]
    if dim_sizes != traced_graph.dim_sizes:  # orders that agree at one binding only would be a coincidence
        facts_at_sizes.append(infer_graph(traced_graph.model, dim_sizes))
    views = [(facts, facts.shapes_by_name) for facts in facts_at_sizes]
    inside = fused_operand_inputs(traced_graph)
    masks: dict[str, RowMask | None] = {}
    for tensor, rows in tensors:
        mask = find_row_mask(streams, inside.get(tensor, tensor), rows, views)
        masks[tensor] = mask if masks.get(tensor, mask) == mask else None
    row_masks = {tensor: mask for tensor, mask in masks.items() if mask is not None}
    used = {mask.name for mask in row_masks.values()}
    sources = {mask_name(k): source for k, source in enumerate(streams.sources) if mask_name(k) in used}
    return PaddingMasks(row_masks, dict(sorted(sources.items())))


def mask_name(index: int) -> str:
    """The input that masks the tokens of padding source number ``index``."""
    return f"snpc_counts_{index}"


def find_row_mask(
    streams: TokenStreams, tensor: str, rows: RowCounter, views: Sequence[tuple[ShapeFacts, Mapping[str, Shape | None]]]
) -> RowMask | None:
    """The mask of the rows of one tensor; ``views``: facts and shapes at several sizes of the dynamic dimensions."""
    for index, source in enumerate(streams.sources):
        if streams.stream_of.get(tensor) != source.stream:
            continue
        order, *others = {row_order(source, rows, shapes.get(tensor), facts) for facts, shapes in views}
        if order is None or others:
            continue
        if order == "merged" and any(has_tokens_first(streams, source, facts) for facts, _ in views):
            continue  # which of the two axes was merged into the other is unknown
        return RowMask(mask_name(index), order)
    return None


def fused_operand_inputs(traced_graph: TracedGraph) -> dict[str, str]:
    """Query, key or value inside a fused node ("node.q") -> the node's input that has the same tokens."""
    inputs: dict[str, str] = {}
    for node in traced_graph.model.graph:
        if (node.domain, node.op_type) in ATTENTION_FORMS:
            form = ATTENTION_FORMS[node.domain, node.op_type]
            for part, index in zip("qkv", (form.query, form.key, form.value), strict=True):
                value = node.inputs[index] if index < len(node.inputs) else None
                value = node.inputs[form.query] if value is None else value  # one input holds all three
                if value is not None:
                    inputs[f"{node.name}.{part}"] = str(value.name)
    return inputs


def probe_row_counters(probes: Iterable[tuple[Probe, int]]) -> Iterator[tuple[str, RowCounter]]:
    """Probes of so many units, as ``find_padding`` takes them."""
    for probe, units in probes:
        if probe.kind == "expert":  # the rows are chosen by data: which tokens they belong to is not known
            continue
        layout = infer_probe_layout(probe, units)
        yield probe.tensor, lambda shape, layout=layout: samples_and_rows(layout, shape)  # type: ignore[misc]


def source_sizes(source: PaddingSource, facts: ShapeFacts) -> tuple[int, int] | None:
    """(batch, tokens) of a source."""
    shape = facts.shape.get(source.value)
    return None if shape is None else (shape[0] // max(source.heads_on_axis, 1), shape[source.key_axis])


def has_tokens_first(streams: TokenStreams, source: PaddingSource, facts: ShapeFacts) -> bool:
    """Has any tensor of the source's stream its tokens in front of its batch?"""
    batch, tokens = source_sizes(source, facts) or (1, 1)
    return batch != tokens and any(
        shape is not None and len(shape) > 2 and shape[:2] == (tokens, batch)
        for value, shape in facts.shape.items()
        if streams.stream_of.get(str(value.name)) == source.stream
    )


def row_order(source: PaddingSource, rows: RowCounter, shape: Shape | None, facts: ShapeFacts) -> RowOrder | None:
    """How the source's tokens are arranged in the rows of a tensor of this shape; None where rows are not tokens."""
    sizes = source_sizes(source, facts)
    if sizes is None or shape is None:
        return None
    batch, tokens = sizes
    orders: dict[tuple[int, int], RowOrder]
    orders = {(tokens, batch): "tokens_first", (batch * tokens, 1): "merged", (batch, tokens): "batch_first"}
    return orders.get(rows(shape))


@contextmanager
def token_mask_runner(
    traced_graph: TracedGraph, padding: PaddingMasks, execution: Execution = DEFAULT_EXECUTION
) -> Iterator[Callable[[Feeds], TokenMasks]]:
    """A function from feeds to the masks that ``padding`` names, bool [batch, tokens]: does the token count?"""
    if not padding.sources:
        yield lambda feeds: {}
        return
    masks = padding.reading
    with temporary_session(masking_model(traced_graph, padding), execution=execution) as run:
        yield lambda feeds: masks(run(feeds))


def masking_model(traced_graph: TracedGraph, padding: PaddingMasks) -> ir.Model:
    """The model with what the masks of ``padding`` are read from as outputs, under their names."""
    instrument = Instrument(traced_graph.model)
    for name, source in padding.sources.items():
        if source.kind == "weights":
            instrument.add_output(instrument.max_attention(source), name)
        else:
            dtype = traced_graph.facts.dtype[source.value]
            instrument.add_output(instrument.values[str(source.value.name)], name, dtype or ir.DataType.UNDEFINED)
    return instrument.model


@dataclass(frozen=True)
class MaskReading:
    """From the outputs of ``masking_model`` to masks. ``from_weights``: name of a mask -> is it read from attention
    weights?"""

    from_weights: Mapping[str, bool]

    def __call__(self, outputs: Mapping[str, AnyArray]) -> TokenMasks:
        return {name: valid_tokens(outputs[name], weights) for name, weights in self.from_weights.items()}


def valid_tokens(array: AnyArray, weights: bool) -> TokenMask:
    """[batch, tokens]: the tokens that count, from the largest attention weight of each key (``weights``) or from a
    mask [batch, .., keys]. All tokens of a sample count where none would."""
    threshold = MIN_ATTENTION_WEIGHT if weights else MASKED_SCORE if array.dtype.kind in "fV" else 0
    valid: TokenMask = np.any(array > threshold, axis=tuple(range(1, array.ndim - 1)))
    valid[~valid.any(axis=1)] = True
    return valid
