"""Every operator that a model can be trained through: ``implementation`` answers for a domain and a name."""

from __future__ import annotations

from snpc.torch.operators import attention, layers, movement, pointwise
from snpc.torch.operators.registry import REGISTRY, Call, Implementation

__all__ = ["Call", "Implementation", "implementation", "implemented"]

FAMILIES = (attention, layers, movement, pointwise)


def implementation(domain: str, name: str) -> Implementation | None:
    return REGISTRY.get(("" if domain == "ai.onnx" else domain, name))


def implemented() -> list[str]:
    return sorted(f"{domain}.{name}" if domain else name for domain, name in REGISTRY)
