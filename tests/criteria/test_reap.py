"""REAP against its definition, computed from what torch's own model routes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from snpc.criteria.reap import Reap
from snpc.pipeline.score import score
from snpc.types import CriterionInputs
from tests.closed_forms import calibration_of
from tests.models.experts import CHOSEN, COUNT, EXPERTS
from tests.oracle import analysis_of, feeds_of


def routed_means(layer: Any, tokens: Any) -> np.ndarray[Any, Any]:
    """[experts]: mean over an expert's tokens of share times norm of its output, token by token."""
    import torch
    from torch.nn import functional

    shares = functional.softmax(tokens @ layer.gate.weight.T, dim=-1)
    found: list[list[float]] = [[] for _ in range(COUNT)]
    for token, share in zip(tokens, shares, strict=True):
        best = torch.topk(share, CHOSEN).indices
        for k in best.tolist():
            if hasattr(layer.experts, "gate_up_proj"):
                gate, up = (layer.experts.gate_up_proj[k] @ token).chunk(2)
                made = layer.experts.down_proj[k] @ (functional.silu(gate) * up)
            else:
                made = layer.experts[k](token)
            found[k].append(float(share[k] / share[best].sum() * made.norm()))
    return np.array([np.mean(values) if values else 0.0 for values in found])


@pytest.mark.parametrize("name", ["qwen3moe__ts17", "qwen3moe__dyn20", "unrolled__ts17"])
@pytest.mark.parametrize("criterion", ["reap", "mixed"])
def test_score_is_the_mean_of_what_an_expert_adds_to_its_tokens(name: str, criterion: str) -> None:
    import torch

    analysis = analysis_of(name)
    feeds = feeds_of(name)
    feeds = {**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])}
    scores = score(analysis, criterion, calibration_of(analysis, feeds), roles=("experts",))
    module = EXPERTS[name].build().module
    seen: list[Any] = []
    layers = [m for m in module.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        module(*(torch.from_numpy(value) for value in feeds.values()))
        expected = [routed_means(layer, x.reshape(-1, x.shape[-1])) for layer, x in zip(layers, seen, strict=True)]
    groups = [g for g in analysis.groups if g.role == "experts"]
    for group, means in zip(sorted(groups, key=lambda g: g.id), expected, strict=True):
        np.testing.assert_allclose(scores.values[group.id][0], means, rtol=1e-4, atol=1e-6)


def test_without_data_the_norms_of_router_and_expert_are_multiplied() -> None:
    rng = np.random.default_rng(0)
    router, up, down = rng.normal(size=(3, 5)), rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    inputs = CriterionInputs("experts", 1, 3, {"router": router}, {"up": up, "down": down}, {}, 0)
    both = np.concatenate([up, down], axis=1)
    expected = np.linalg.norm(router, axis=1) * np.linalg.norm(both, axis=1)
    np.testing.assert_allclose(Reap().score(inputs)[0], expected)
