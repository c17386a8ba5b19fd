"""The table of operators: what snpc knows about an operator stands in this package and nowhere else.

``lookup`` answers for every operator there is: one without an entry is opaque, and says so in its reason.
"""

from __future__ import annotations

from functools import cache

from snpc.ops import attention, contraction, indexing, movement, normalization, opaque, pointwise, rotary
from snpc.ops.spec import OpSpec

__all__ = ["lookup", "table"]


@cache
def table() -> dict[tuple[str, str], OpSpec]:
    found: dict[tuple[str, str], OpSpec] = {}
    for family in (movement, indexing, contraction, pointwise, normalization, attention, rotary, opaque):
        for spec in family.entries():
            key = (spec.domain, spec.name)
            if key in found:
                raise ValueError(f"two entries for operator {spec.domain}::{spec.name}")
            found[key] = spec
    return found


@cache
def lookup(domain: str, name: str) -> OpSpec:
    domain = "" if domain == "ai.onnx" else domain
    known = table().get((domain, name))
    if known:
        return known
    label = f"{domain}.{name}" if domain else name
    return OpSpec(
        name, "opaque", "pinned: no entry", domain=domain, reason=f"no entry for {label} in the operator table"
    )
