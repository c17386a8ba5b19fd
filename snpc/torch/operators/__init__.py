"""Every operator that a model can be trained through: ``find_implementation`` answers for a domain and a name."""

from __future__ import annotations

from snpc.torch.operators import attention, layers, movement, pointwise
from snpc.torch.operators.registry import REGISTRY, Implementation, OperatorCall

__all__ = ["Implementation", "OperatorCall", "find_implementation", "implemented_operators"]

OPERATOR_MODULES = (attention, layers, movement, pointwise)


def find_implementation(domain: str, name: str) -> Implementation | None:
    return REGISTRY.get(("" if domain == "ai.onnx" else domain, name))


def implemented_operators() -> list[str]:
    return sorted(f"{domain}.{name}" if domain else name for domain, name in REGISTRY)
