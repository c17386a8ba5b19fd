"""Losses: each gives one number per sample, so that averages over processes are exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from snpc.torch.operators.registry import Tensor
from snpc.torch.training.options import TrainingOptions


@dataclass(frozen=True)
class Batch:
    """What a step is given. ``targets``: the teacher's values by name; ``weight``: what the batch's mean counts in the
    average over processes."""

    feeds: Mapping[str, Tensor]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    weight: float = 1.0


LossFunction = Callable[[torch.nn.Module, Batch], Tensor]
"""(module, batch) -> [samples], or anything else whose mean is to fall."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[samples]: Kullback-Leibler divergence over the last axis, times the temperature's square, averaged over the rest
    (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    ours = F.log_softmax(student.float() / temperature, -1)
    theirs = F.log_softmax(teacher.float() / temperature, -1)
    gap = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2
    return mean_per_sample(gap)


def relative_squared_error(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """[samples]: mean squared error, as a share of ``scale``."""
    return mean_per_sample((student.float() - teacher.float()).square()) / scale


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[samples]: of labels [samples, ...] under ``logits`` [samples, ..., classes]; negative labels do not count."""
    flat = labels.reshape(-1).to(logits.device)
    found = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    counted = (flat >= 0).to(found.dtype).reshape(len(labels), -1).sum(1).clamp(min=1)
    return found.reshape(len(labels), -1).sum(1) / counted


def mean_per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1) if values.ndim > 1 else values


def distillation_loss(
    training: TrainingOptions, outputs: tuple[str, ...], hidden: tuple[str, ...], scales: Mapping[str, float]
) -> LossFunction:
    """The loss that ``training`` describes. ``scales``: mean square of the teacher's values, for relative errors."""

    def loss(module: torch.nn.Module, batch: Batch) -> Tensor:
        found = module(batch.feeds)
        parts = []
        for name in outputs:
            if "kd" in training.loss:
                parts.append(kl_divergence(found[name], batch.targets[name], training.temperature))
            if training.loss == "mse":
                parts.append(relative_squared_error(found[name], batch.targets[name], scales[name]))
            if training.uses_labels:
                assert batch.labels is not None
                parts.append(cross_entropy(found[name], batch.labels))
        total = torch.stack([part.mean() for part in parts]).sum()
        if hidden:
            errors = [relative_squared_error(found[name], batch.targets[name], scales[name]).mean() for name in hidden]
            total = total + torch.stack(errors).mean()
        return total

    return loss
