"""Torch implementations of ONNX operators, by domain and name.

``registry`` holds them; ``attention``, ``layers``, ``movement`` and ``pointwise`` define them, by kind. ``relevance``
replaces their gradients.
"""

from __future__ import annotations

from snpc.torch.operators import attention, layers, movement, pointwise
from snpc.torch.operators.registry import REGISTRY, Implementation, OperatorCall

__all__ = ["Implementation", "OperatorCall", "find_implementation", "implemented_operators"]

OPERATOR_MODULES = (attention, layers, movement, pointwise)


def find_implementation(domain: str, name: str) -> Implementation | None:
    """The implementation of an operator, None where there is none."""
    return REGISTRY.get(("" if domain == "ai.onnx" else domain, name))


def implemented_operators() -> list[str]:
    """ "Add", ..., "com.microsoft.Attention", ...: sorted."""
    return sorted(f"{domain}.{name}" if domain else name for domain, name in REGISTRY)
