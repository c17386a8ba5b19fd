"""Torch implementations of ONNX operators, by domain and name.

``registry`` holds them; ``attention``, ``layers``, ``movement`` and ``pointwise`` define them, by kind. ``relevance``
replaces their gradients.

Files
  attention  Attention and rotary embedding as single nodes.
  layers     Products with weights, convolutions, pooling, reductions and normalizations.
  movement   Operators that move entries, read shapes, or make constants.
  pointwise  Operators that compute entry by entry.
  registry   The registry of torch implementations: one function per operator, under its domain and name.
  relevance  Layer-wise relevance propagation as gradient times input: gradients of units and gates.
"""

from __future__ import annotations

from snpc.torch.operators import attention, layers, movement, pointwise
from snpc.torch.operators.registry import REGISTRY, Implementation, OperatorCall, Result, Tensor, to_tensor
from snpc.torch.operators.relevance import relevance_rules

__all__ = [
    "Implementation",
    "OperatorCall",
    "Result",
    "Tensor",
    "find_implementation",
    "implemented_operators",
    "relevance_rules",
    "to_tensor",
]

OPERATOR_MODULES = (attention, layers, movement, pointwise)


def find_implementation(domain: str, name: str) -> Implementation | None:
    """The implementation of an operator, None where there is none."""
    return REGISTRY.get(("" if domain == "ai.onnx" else domain, name))


def implemented_operators() -> list[str]:
    """ "Add", ..., "com.microsoft.Attention", ...: sorted."""
    return sorted(f"{domain}.{name}" if domain else name for domain, name in REGISTRY)
