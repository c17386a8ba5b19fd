"""New random weights for a pruned model: training from scratch is a baseline (Liu et al. 2019, arXiv 1810.05270)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from snpc.ops import lookup
from snpc.passes.canonicalization import original_name
from snpc.torch.module import GraphModule
from snpc.torch.trainable_weights import consumers_past_movement
from snpc.types import Model

TABLE_DEVIATION = 0.02  # standard deviation of embedding tables and of what is added to tokens


def reinitialize(module: GraphModule, model: Model, seed: int) -> None:
    """Draw every weight anew: matrices and kernels with Glorot's variance, tables with ``TABLE_DEVIATION``; gains are
    one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    values = {original_name(v): v for v in model.graph.graph.initializers.values()}
    with torch.no_grad():
        for name, weight in module.weights():
            uses = [(lookup(node.domain, node.op_type), index) for node, index in consumers_past_movement(values[name])]
            weight.copy_(draw_weight(weight, uses, generator))


def draw_weight(weight: torch.Tensor, uses: Sequence[tuple[object, int]], generator: torch.Generator) -> torch.Tensor:
    """``uses``: (operator, input index) of the weight's consumers; the first decides."""
    spec, index = uses[0] if uses else (None, 0)
    kind, effect = getattr(spec, "kind", ""), getattr(spec, "effect", "")
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    if sum(n > 1 for n in weight.shape) > 1:
        if kind not in ("contraction", "attention"):
            return noise.mul(TABLE_DEVIATION)
        kernel_size = weight.shape[2:].numel() if weight.ndim > 2 else 1
        return noise.mul((2 / (kernel_size * (weight.shape[0] + weight.shape[1]))) ** 0.5)
    is_gain = (kind == "normalize" and index == (getattr(spec, "affine", ()) or (1,))[0]) or effect == "scale"
    return torch.ones_like(weight) if is_gain else torch.zeros_like(weight)
