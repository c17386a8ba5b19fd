"""Operators whose output jumps where floats that are equal up to rounding change their order or round apart."""

from __future__ import annotations

NAMES = (
    "TopK ArgMax ArgMin NonMaxSuppression Unique NonZero Hardmax Greater GreaterOrEqual Less LessOrEqual Equal Round "
    "Floor Ceil Sign"
)
DISCONTINUOUS = frozenset(NAMES.split())


def is_discontinuous(domain: str, name: str) -> bool:
    """Whether equal inputs, up to rounding, may give other outputs."""
    return domain in ("", "ai.onnx") and name in DISCONTINUOUS
