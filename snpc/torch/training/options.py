"""Options of a training run, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from snpc.errors import UserError

LossKind = Literal["kd", "ce", "mse", "kd+ce"]
Regularizer = Literal["decay", "lobster"]
Reinit = Literal["none", "epochs", "budget"]
TrainingPrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a run. Raises UserError for values out of range.

    The run lasts ``steps`` steps, or else ``epochs``; ``batch`` is the number of samples per step over all processes.
    ``lr`` is reached after ``warmup`` steps (None: a twentieth of all) and falls to zero along a cosine (SGDR, arXiv
    1608.03983, without restarts). ``decay`` is AdamW's weight decay (arXiv 1711.05101), on matrices only.

    ``regularize`` "lobster" scales that decay of each weight by what its gradient is short of one (see
    ``training/sparsity.py``). ``sparsify``: set the smallest weights of all matrices to zero, at every evaluation as
    many as let the held-out loss rise by so much above that of the given weights, and keep them at zero (0: none). The
    last weights are then written, not the best.

    ``loss``: "kd" is the Kullback-Leibler divergence from the teacher's outputs at ``temperature``, times its square
    (arXiv 1503.02531, section 2); "mse" the squared error from them, relative to their mean square; "ce" the cross
    entropy of the labels; "kd+ce" the sum. ``layerwise`` adds the relative squared error of the hidden states behind
    every layer, averaged. ``outputs``: the model outputs that the loss compares; empty: the logits (for "mse" all).

    ``clip``: largest norm of the gradient (0: any). ``ema``: decay of a moving average of the weights, which is written
    instead of the last ones (0: none). Weights are evaluated on held-out data, and the best are written, the initial
    ones included. ``evaluate``: steps between evaluations (0: an epoch, or a twentieth of the run where that is
    shorter). ``early_stop``: stop after so many evaluations without improvement (0: never).
    ``precision`` "auto" is bf16 on GPUs that have it.

    ``metric``: how changed outputs are judged, see ``snpc.plan``; texts.

    ``adapters``: train updates of this rank for the matrices, and nothing else (0: all weights). ``reinit`` "epochs"
    begins with new weights; "budget" too, and takes more steps in proportion to the MACs that pruning saved (Scratch-E
    and Scratch-B of arXiv 1810.05270). ``sharded``: each process holds a shard of weights, gradients and optimizer
    state (FSDP) instead of a copy.
    """

    epochs: int = 20
    steps: int = 0
    batch: int = 32
    lr: float = 3e-4
    decay: float = 0.01
    regularize: Regularizer = "decay"
    sparsify: float = 0.0
    warmup: int | None = None
    loss: LossKind = "kd"
    temperature: float = 2.0
    layerwise: bool = False
    outputs: tuple[str, ...] = ()
    clip: float = 1.0
    ema: float = 0.0
    early_stop: int = 0
    evaluate: int = 0
    adapters: int = 0
    reinit: Reinit = "none"
    seed: int = 0
    precision: TrainingPrecision = "auto"
    sharded: bool = False
    metric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            require_option(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "early_stop", "evaluate", "seed", "clip", "decay", "sparsify", "adapters"):
            require_option(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require_option(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "0 or more steps")
        require_option(self.lr > 0, "lr", self.lr, "more than 0")
        require_option(self.temperature > 0, "temperature", self.temperature, "more than 0")
        require_option(0 <= self.ema < 1, "ema", self.ema, "in [0, 1)")
        require_option(self.loss in get_args(LossKind), "loss", self.loss, f"one of {', '.join(get_args(LossKind))}")
        require_option(self.reinit in get_args(Reinit), "reinit", self.reinit, f"one of {', '.join(get_args(Reinit))}")
        require_option(self.reinit == "none" or not self.adapters, "adapters", self.adapters, "0 with new weights")
        require_option(not (self.sharded and self.adapters), "adapters", self.adapters, "0 with sharded weights")
        kinds = get_args(Regularizer)
        require_option(self.regularize in kinds, "regularize", self.regularize, f"one of {', '.join(kinds)}")
        require_option(
            self.regularize != "lobster" or self.sparsify > 0, "sparsify", self.sparsify, "more than 0 for lobster"
        )
        if self.sparsify:
            for name, off in (("ema", 0), ("early_stop", 0), ("adapters", 0), ("sharded", False), ("reinit", "none")):
                require_option(
                    getattr(self, name) == off, name, getattr(self, name), f"{off} where weights are sparsified"
                )
        require_option(self.precision in get_args(TrainingPrecision), "precision", self.precision, "auto, fp32 or bf16")

    @property
    def uses_teacher(self) -> bool:
        """Does the loss need the teacher's outputs?"""
        return self.loss != "ce" or self.layerwise

    @property
    def uses_labels(self) -> bool:
        return "ce" in self.loss


def require_option(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise UserError(f"{name} {value}: must be {expected}")


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run is after a step. ``loss`` is smoothed; ``lr`` is the learning rate of the step; ``drift`` is the best
    of all evaluations, None without one."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds_left: float
    drift: float | None = None


TrainingCallback = Callable[[TrainingProgress], None]
