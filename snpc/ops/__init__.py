"""The operator table: what snpc knows about operators is in this package and nowhere else.

``lookup`` has an answer for every operator: one without an entry is opaque, and its reason says so.
"""

from __future__ import annotations

from functools import cache

from snpc.ops.attention import attention_entries
from snpc.ops.contraction import contraction_entries
from snpc.ops.indexing import indexing_entries
from snpc.ops.movement import movement_entries
from snpc.ops.normalization import normalization_entries
from snpc.ops.opaque import opaque_entries
from snpc.ops.pointwise import pointwise_entries
from snpc.ops.rotary import rotary_entries
from snpc.ops.spec import OpSpec

__all__ = ["lookup", "operator_table"]


@cache
def operator_table() -> dict[tuple[str, str], OpSpec]:
    table: dict[tuple[str, str], OpSpec] = {}
    families = (
        movement_entries,
        indexing_entries,
        contraction_entries,
        pointwise_entries,
        normalization_entries,
        attention_entries,
        rotary_entries,
        opaque_entries,
    )
    for entries in families:
        for spec in entries():
            key = (spec.domain, spec.name)
            if key in table:
                raise ValueError(f"two entries for operator {spec.domain}::{spec.name}")
            table[key] = spec
    return table


@cache
def lookup(domain: str, name: str) -> OpSpec:
    domain = "" if domain == "ai.onnx" else domain
    known = operator_table().get((domain, name))
    if known:
        return known
    label = f"{domain}.{name}" if domain else name
    return OpSpec(
        name, "opaque", "pinned: no entry", domain=domain, reason=f"no entry for {label} in the operator table"
    )
