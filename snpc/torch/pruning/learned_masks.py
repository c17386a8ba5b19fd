"""Learned masks: a trained factor on every unit, with a penalty on MACs. The learned importance becomes a plan.

The model's weights are not trained. Each method defines the factor of a unit, which fraction of it counts as kept, the
penalty beside the distillation loss, and the unit's importance in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.runtime.statistics import group_weight_rows
from snpc.torch.module import GraphModule
from snpc.torch.operators import Tensor
from snpc.torch.pruning.gates import Gate, apply_gates
from snpc.types import FloatArray, Group

MACS_PENALTY = 100.0  # times the squared excess over the target, as a share of the dense MACs
PSP_THRESHOLD = 0.5  # PSP: a scale below it gives the factor 0
INITIAL_LOGIT = 2.0  # APMA: of every indicator
RAMP_WIDTH = 0.1  # PSP: of the sigmoid whose gradient replaces that of the step at the threshold


class LearnedMasks(torch.nn.Module):
    """Factors for ``groups``. ``target``: the share of the dense MACs to reach."""

    def __init__(self, analysis: Analysis, groups: Sequence[Group], target: float) -> None:
        super().__init__()
        self.groups, self.dense_macs, self.target = tuple(groups), analysis.cost.macs, target
        self.max_macs = 1 - analysis.dead_macs / self.dense_macs  # dead rows are removed in any case
        self.indices = {g.id: k for k, g in enumerate(groups)}

    def new_parameters(self, value: float) -> torch.nn.ParameterList:
        return torch.nn.ParameterList(
            [torch.nn.Parameter(torch.full((g.blocks, g.size), float(value))) for g in self.groups]
        )

    def factor(self, group: Group) -> Tensor:
        """[blocks, size]: what each unit is multiplied with."""
        raise NotImplementedError

    def kept_fraction(self, group: Group) -> Tensor:
        """[blocks, size] in [0, 1]: the fraction of each unit that counts as kept."""
        raise NotImplementedError

    def unit_penalty(self, group: Group) -> Tensor:
        """A scalar: the penalty on the group's units, independent of the target."""
        raise NotImplementedError

    def importance(self, group: Group) -> Tensor:
        """[blocks, size]: higher means keep."""
        raise NotImplementedError

    def factors(self) -> dict[str, Tensor]:
        return {g.id: self.factor(g) for g in self.groups}

    def kept_macs(self) -> Tensor:
        """The share of the dense MACs that the masks keep."""
        saved = [(1 - self.kept_fraction(g)).mean() * g.macs for g in self.groups]
        return self.max_macs - torch.stack(saved).sum() / self.dense_macs

    def penalty(self) -> Tensor:
        """What is added to the distillation loss: for MACs above the target, and for every unit."""
        costs = torch.stack([self.unit_penalty(g) * (g.macs / self.dense_macs) for g in self.groups]).sum()
        return MACS_PENALTY * torch.relu(self.kept_macs() - self.target).square() + costs

    def scores(self) -> dict[str, FloatArray]:
        """Group id -> [blocks, size]: importance times MACs. A plan compares scores per saved MAC, and so removes units
        in the order of importance."""
        with torch.no_grad():
            return {g.id: self.importance(g).double().cpu().numpy() * g.macs / (g.blocks * g.size) for g in self.groups}


class VibMasks(LearnedMasks):
    """Variational information bottleneck: factors mu + sigma eps with eps normal noise. The kept fraction of a unit is
    mu^2 / (mu^2 + sigma^2). Its penalty is log(1 + mu^2 / sigma^2) / 2, the information that passes (Dai et al. 2018,
    arXiv 1802.10399, eq. 9). VTrans (arXiv 2406.05276) puts such gates on Transformers."""

    penalty_weight = 0.01

    def __init__(self, analysis: Analysis, groups: Sequence[Group], target: float) -> None:
        super().__init__(analysis, groups, target)
        self.mean, self.log_variance = self.new_parameters(1.0), self.new_parameters(-4.0)  # the logarithm of sigma^2

    def factor(self, group: Group) -> Tensor:
        index = self.indices[group.id]
        mean, log_variance = self.mean[index], self.log_variance[index]
        noise = torch.randn_like(mean) * torch.exp(log_variance / 2)
        return torch.add(mean, noise) if self.training else mean

    def signal_to_noise(self, group: Group) -> Tensor:
        """mu^2 / sigma^2."""
        index = self.indices[group.id]
        return torch.mul(self.mean[index].square(), (-self.log_variance[index]).exp())

    def kept_fraction(self, group: Group) -> Tensor:
        ratio = self.signal_to_noise(group)
        return torch.div(ratio, 1 + ratio)

    def unit_penalty(self, group: Group) -> Tensor:
        return torch.log1p(self.signal_to_noise(group)).mean() * (self.penalty_weight / 2)

    def importance(self, group: Group) -> Tensor:
        return torch.log1p(self.signal_to_noise(group))


class PspMasks(LearnedMasks):
    """One scale per unit. Below a threshold the factor is 0, but the gradient passes (straight-through estimator). The
    penalty is the absolute value. After parameterized structured pruning (Schindler et al. 2019, arXiv 1906.05180)."""

    price = 0.01

    def __init__(self, analysis: Analysis, groups: Sequence[Group], target: float) -> None:
        super().__init__(analysis, groups, target)
        self.scale = self.new_parameters(1.0)

    def factor(self, group: Group) -> Tensor:
        scale = self.scale[self.indices[group.id]]
        return torch.add(scale, (torch.where(scale.abs() < PSP_THRESHOLD, 0.0, scale) - scale).detach())

    def kept_fraction(self, group: Group) -> Tensor:
        return torch.sigmoid((self.scale[self.indices[group.id]].abs() - PSP_THRESHOLD) / RAMP_WIDTH)

    def unit_penalty(self, group: Group) -> Tensor:
        return torch.mul(self.scale[self.indices[group.id]].abs().mean(), self.price)

    def importance(self, group: Group) -> Tensor:
        return torch.abs(self.scale[self.indices[group.id]])


class ApmaMasks(LearnedMasks):
    """An indicator in (0, 1) per unit. Its penalty grows with the unit's similarity to the others of its head. Every
    head loses the same share: a unit's importance is its indicator relative to the mean of its head. After automatic
    channel pruning for multi-head attention (arXiv 2405.20867); its formulas are not reproduced."""

    price = 0.05

    def __init__(self, analysis: Analysis, groups: Sequence[Group], target: float) -> None:
        super().__init__(analysis, groups, target)
        self.indicator = self.new_parameters(INITIAL_LOGIT)
        for index, group in enumerate(self.groups):
            self.register_buffer(f"similarity{index}", mean_cosine_similarity(analysis, group))

    def factor(self, group: Group) -> Tensor:
        return torch.sigmoid(self.indicator[self.indices[group.id]]) * (1 + math.exp(-INITIAL_LOGIT))

    def kept_fraction(self, group: Group) -> Tensor:
        return torch.sigmoid(self.indicator[self.indices[group.id]])

    def unit_penalty(self, group: Group) -> Tensor:
        similarity: Tensor = getattr(self, f"similarity{self.indices[group.id]}")
        return self.price * (self.kept_fraction(group) * similarity).mean()

    def importance(self, group: Group) -> Tensor:
        kept = self.kept_fraction(group)
        return kept - kept.mean(dim=1, keepdim=True) + kept.mean()


MASK_METHODS: Mapping[str, type[LearnedMasks]] = MappingProxyType({"vib": VibMasks, "psp": PspMasks, "apma": ApmaMasks})


def make_masks(kind: str, analysis: Analysis, groups: Sequence[Group], target: float) -> LearnedMasks:
    """Masks of a method. Raises UserError for an unknown one."""
    if kind not in MASK_METHODS:
        raise UserError(f"masks {kind!r}: there are {', '.join(MASK_METHODS)}")
    return MASK_METHODS[kind](analysis, groups, target)


def mean_cosine_similarity(analysis: Analysis, group: Group) -> Tensor:
    """[blocks, size] in [0, 1]: mean |cosine| between a unit's weights and those of the other units of its block."""
    producers, consumers = group_weight_rows(analysis, group)
    rows = np.concatenate([*producers.values(), *consumers.values()], axis=1).reshape(group.blocks, group.size, -1)
    norm = np.linalg.norm(rows, axis=2, keepdims=True)
    unit = rows / np.where(norm > 0, norm, 1.0)
    cosine = np.abs(unit @ unit.transpose(0, 2, 1)).sum(axis=2) - (norm[..., 0] > 0)
    return torch.as_tensor(cosine / max(group.size - 1, 1), dtype=torch.float32)


class MaskedModule(torch.nn.Module):
    """A module whose units are multiplied with masks. Only the masks are trained."""

    def __init__(self, module: GraphModule, gates: Sequence[Gate], masks: LearnedMasks) -> None:
        super().__init__()
        self.inner, self.gates, self.masks = module.requires_grad_(False), tuple(gates), masks

    def forward(self, feeds: Any) -> Any:
        with apply_gates(self.inner, self.gates, self.masks.factors()):
            return self.inner(feeds)
