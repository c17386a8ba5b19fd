"""What can be cut, counted by kind: (role, blocks, units per block)."""

from __future__ import annotations

from collections import Counter

from snpc.passes.analyze import Analysis

Kinds = Counter[tuple[str, int, int]]


def attention(heads: int, size: int, count: int, *, kv_heads: int | None = None) -> Kinds:
    """Plain multi-head attention: widths of Q and K per head, of V per head, and the heads themselves."""
    return Counter({("qk", heads, size): count, ("vo", kv_heads or heads, size): count, ("head", 1, heads): count})


def without(kinds: Kinds, *roles: str) -> Kinds:
    return Counter({kind: count for kind, count in kinds.items() if kind[0] not in roles})


def ffn(size: int, count: int) -> Kinds:
    return Counter({("ffn", 1, size): count})


def kinds_in(analysis: Analysis) -> Kinds:
    return Counter((g.role, g.blocks, g.size) for g in analysis.groups if g.prunable)
