"""Random inputs for an analyzed model: one feed of them."""

from __future__ import annotations

import onnx_ir as ir

from snpc.graph import DimSizes, ShapeFacts, coprime_dim_sizes, leading_dims
from snpc.ops import lookup
from snpc.passes import Analysis
from snpc.runtime.execution.feeds import random_feeds
from snpc.types import AnyArray


def random_batch(
    analysis: Analysis, batch: int, seed: int = 0, dim_sizes: DimSizes | None = None
) -> dict[str, AnyArray]:
    """One feed of ``batch`` samples, or of the model's own batch size where that is static or the graph takes no other.

    Dynamic axes have ``dim_sizes`` (those of the analysis where None), but for sizes that the user gave.
    """
    sizes = feed_sizes(analysis, batch, dim_sizes if dim_sizes is not None else analysis.traced_graph.dim_sizes)
    return random_feeds(analysis.model.inputs, batch=batch, dim_sizes=sizes, seed=seed, id_limits=id_limits(analysis))


def feed_sizes(analysis: Analysis, batch: int, dim_sizes: DimSizes) -> DimSizes:
    """``dim_sizes`` with ``batch`` samples, where the graph takes that many, and the sizes that the user gave."""
    given = analysis.given_sizes
    leading = leading_dims(analysis.model.graph.graph)
    return dim_sizes.resized({**dict.fromkeys(leading, batch), **given}, given)


def probe_batch(analysis: Analysis, dim_sizes: DimSizes) -> tuple[dict[str, AnyArray], DimSizes]:
    """One feed at other sizes than ``dim_sizes``, coprime to them, and these sizes; nothing without dynamic axes."""
    sizes = coprime_dim_sizes(dim_sizes, leading_dims(analysis.model.graph.graph))
    if sizes == dim_sizes:
        return {}, sizes
    return random_feeds(analysis.model.inputs, dim_sizes=sizes, id_limits=id_limits(analysis)), sizes


def id_limits(analysis: Analysis) -> dict[str, int]:
    return embedding_rows(analysis.model.graph, analysis.traced_graph.facts)


def embedding_rows(model: ir.Model, facts: ShapeFacts) -> dict[str, int]:
    """Name of an integer input -> rows of the embedding table that it indexes."""
    rows: dict[str, int] = {}
    for value in model.graph.inputs:
        limits = indexed_table_rows(facts, value)
        if limits:
            rows[str(value.name)] = min(limits)
    return rows


def indexed_table_rows(facts: ShapeFacts, value: ir.Value) -> list[int]:
    """Rows of every constant that ``value`` indexes, directly or through casts and reshapes."""
    rows: list[int] = []
    for node, index in value.uses():
        spec = lookup(node.domain, node.op_type)
        if index == 0 and (spec.kind == "movement" or (spec.kind == "pointwise" and len(node.inputs) == 1)):
            rows += indexed_table_rows(facts, node.outputs[0])
        table = node.inputs[0] if index == 1 else None
        shape = facts.shape.get(table) if table is not None else None
        if shape and table is not None and table.const_value is not None:
            axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 0
            rows.append(int(shape[axis]))
    return rows
