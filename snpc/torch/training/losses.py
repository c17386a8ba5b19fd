"""Losses. Each gives one number per sample, so that averages over processes are exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from snpc.torch.operators import Tensor
from snpc.torch.training.options import TrainingOptions


@dataclass(frozen=True)
class Batch:
    """The data of a step. ``targets``: the teacher's values by name. ``weight``: of the batch's mean, in the average
    over processes."""

    feeds: Mapping[str, Tensor]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    weight: float = 1.0


LossFunction = Callable[[torch.nn.Module, Batch], Tensor]
"""(module, batch) -> [samples], or any other tensor whose mean is minimized."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """[samples]: Kullback-Leibler divergence over the last axis, times the temperature's square, averaged over the rest
    (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    student_log = F.log_softmax(student.float() / temperature, -1)
    teacher_log = F.log_softmax(teacher.float() / temperature, -1)
    student_log, teacher_log = finite_in_teacher(student_log, teacher_log)
    terms = F.kl_div(student_log, teacher_log, reduction="none", log_target=True)
    return mean_per_sample(terms.sum(-1) * temperature**2)


def finite_in_teacher(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with zeros where the teacher is infinite: masked entries, which have no gradient. What the student alone has
    stays, and stops the training."""
    finite = torch.isfinite(teacher)
    if finite.all():
        return student, teacher
    return torch.where(finite, student, 0.0), torch.where(finite, teacher, 0.0)


def relative_squared_error(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """[samples]: mean squared error, divided by ``scale``."""
    student, teacher = finite_in_teacher(student.float(), teacher.float())
    return mean_per_sample((student - teacher).square()) / scale


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[samples]: of labels [samples, ...] under ``logits`` [samples, ..., classes]; negative labels are ignored."""
    classes = labels.reshape(-1).to(logits.device)
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), classes.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    counted = (classes >= 0).to(losses.dtype).reshape(len(labels), -1).sum(1).clamp(min=1)
    return losses.reshape(len(labels), -1).sum(1) / counted


def mean_per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1) if values.ndim > 1 else values


def distillation_loss(
    training: TrainingOptions, outputs: tuple[str, ...], hidden: tuple[str, ...], scales: Mapping[str, float]
) -> LossFunction:
    """The loss that ``training`` describes, of these outputs and hidden states. ``scales``: mean square of each of the
    teacher's values, which errors are relative to."""

    def loss(module: torch.nn.Module, batch: Batch) -> Tensor:
        values = module(batch.feeds)
        terms = []
        for name in outputs:
            if "kd" in training.loss:
                terms.append(kl_divergence(values[name], batch.targets[name], training.temperature))
            if training.loss == "mse":
                terms.append(relative_squared_error(values[name], batch.targets[name], scales[name]))
            if training.uses_labels:
                assert batch.labels is not None
                terms.append(cross_entropy(values[name], batch.labels))
        total = torch.stack([term.mean() for term in terms]).sum()
        if hidden:
            errors = [relative_squared_error(values[name], batch.targets[name], scales[name]).mean() for name in hidden]
            total = total + torch.stack(errors).mean()
        return total

    return loss
