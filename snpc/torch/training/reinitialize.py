"""New weights for an architecture, to ask what the old ones were worth (Liu et al. 2019, arXiv 1810.05270)."""

from __future__ import annotations

import torch

from snpc.ops import lookup
from snpc.passes.canonicalization.shared_constants import original_name
from snpc.torch.module import GraphModule
from snpc.torch.trainable_weights import consumers_past_movement
from snpc.types import Model

TABLE_DEVIATION = 0.02  # deviation of tables and of what is added to tokens


def reinitialize(module: GraphModule, model: Model, seed: int) -> None:
    """Draw every weight anew: matrices and kernels by Glorot's variance, gains one, biases zero, tables small."""
    generator = torch.Generator().manual_seed(seed)
    values = {original_name(v): v for v in model.graph.graph.initializers.values()}
    with torch.no_grad():
        for name, weight in module.weights():
            weight.copy_(
                draw_weight(
                    weight,
                    [(lookup(n.domain, n.op_type), k) for n, k in consumers_past_movement(values[name])],
                    generator,
                )
            )


def draw_weight(weight: torch.Tensor, uses: list[tuple[object, int]], generator: torch.Generator) -> torch.Tensor:
    spec, index = uses[0] if uses else (None, 0)
    kind, effect = getattr(spec, "kind", ""), getattr(spec, "effect", "")
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    if sum(n > 1 for n in weight.shape) > 1:
        if kind not in ("contraction", "attention"):
            return noise.mul(TABLE_DEVIATION)
        taps = weight.shape[2:].numel() if weight.ndim > 2 else 1
        return noise.mul((2 / (taps * (weight.shape[0] + weight.shape[1]))) ** 0.5)
    gain = (kind == "normalize" and index == (getattr(spec, "affine", ()) or (1,))[0]) or effect == "scale"
    return torch.ones_like(weight) if gain else torch.zeros_like(weight)
