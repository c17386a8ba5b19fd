"""The training loop: a module, a loss, batches and a number of steps. It knows nothing of pruning or teachers.

Every step is a function of the weights, the optimiser's state, the step's number and the seed, so that a run that was
killed goes on from its last checkpoint to the same weights, bit for bit (on a CPU; GPUs add in varying order).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from snpc.errors import UserError
from snpc.torch.training.checkpoints import CheckpointFile
from snpc.torch.training.distributed import Worker
from snpc.torch.training.fsdp import gather_tensors, local_shard, shard_module, shard_optimizer_state
from snpc.torch.training.losses import Batch, LossFunction
from snpc.torch.training.options import TrainingCallback, TrainingOptions, TrainingProgress

LOSS_SMOOTHING = 0.9  # of the loss that is shown


class BatchSource(Protocol):
    """A training set. ``epoch`` gives the same batches for the same number each time, from batch ``first`` on."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, number: int, first: int) -> Iterator[Batch]: ...


@dataclass
class TrainingState:
    """The state of a run between two steps, all that a checkpoint holds. ``average`` and ``best``: tensors beside the
    parameters, in their order; empty where there are none."""

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    ema_weights: list[torch.Tensor] = field(default_factory=list)
    best_weights: list[torch.Tensor] = field(default_factory=list)
    best_drift: float = math.inf
    evaluations_since_best: int = 0
    """Evaluations since the best one."""

    def state_dict(self) -> dict[str, Any]:
        """Of whole tensors, however many processes share them: all of them have to ask."""
        return {
            "step": self.step,
            "weights": gather_tensors([p.detach() for p in self.parameters]),
            "optimiser": gather_tensors(self.optimizer.state_dict()),
            "average": gather_tensors(self.ema_weights),
            "best": gather_tensors(self.best_weights),
            "drift": self.best_drift,
            "behind": self.evaluations_since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(local_shard(saved, parameter))
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(shard_optimizer_state(state["optimiser"], order))
        self.ema_weights, self.best_weights = (
            [local_shard(t, p) for t, p in zip(state[name], self.parameters, strict=False)]
            for name in ("average", "best")
        )
        self.step, self.best_drift, self.evaluations_since_best = state["step"], state["drift"], state["behind"]


class LossModule(torch.nn.Module):
    """A module together with its loss: what DistributedDataParallel wraps, so that it sees what the gradient is of."""

    def __init__(self, module: torch.nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.loss(self.module, batch).mean() * batch.weight


@dataclass(frozen=True)
class TrainingResult:
    """``losses``: of every step that ran here; ``drift``: the best on held-out data, None without any."""

    steps: int
    losses: Sequence[float]
    drift: float | None
    seconds: float


def train(
    module: torch.nn.Module,
    loss: LossFunction,
    batches: BatchSource,
    training: TrainingOptions,
    *,
    place: Worker | None = None,
    parameters: Sequence[torch.nn.Parameter] | None = None,
    evaluate: Callable[[torch.nn.Module], float] | None = None,
    checkpoints: CheckpointFile | None = None,
    report: TrainingCallback | None = None,
) -> TrainingResult:
    """Train ``parameters`` (default: all) of ``module`` in place for ``training.steps`` steps or ``epochs``.

    With ``training.sharded`` the module is left in parts: see ``gathered``.
    ``evaluate``: what early stopping watches, lower is better; called on every process. Raises UserError where the loss
    is no longer finite.
    """
    place = place or Worker(torch.device("cpu"))
    if training.sharded:
        shard_module(module, place)
    trained = [p for p in (parameters or module.parameters()) if p.requires_grad]
    steps = training.steps or training.epochs * batches.steps_per_epoch
    run = TrainingState(trained, make_optimizer(trained, training))
    if training.ema:
        run.ema_weights = [p.detach().clone() for p in trained]
    saved = checkpoints.read(place.device) if checkpoints else None
    if saved is not None:
        run.load_state_dict(saved)
    objective = LossModule(module, loss)
    runner: torch.nn.Module = objective
    if place.world_size > 1 and not training.sharded:
        ids = [place.device] if place.device.type == "cuda" else None
        runner = torch.nn.parallel.DistributedDataParallel(
            objective, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True
        )
    every = training.evaluate or max(1, min(batches.steps_per_epoch, steps // 20))
    losses: list[float] = []
    shown = None
    start, first = time.perf_counter(), run.step
    if training.early_stop and evaluate is not None and not run.step:
        evaluate_and_keep_best(run, module, evaluate)  # what was given may be the best
    stream = batches_from(batches, run.step)
    while run.step < steps and not (training.early_stop and run.evaluations_since_best >= training.early_stop):
        rate = learning_rate(training, run.step, steps)
        value = train_step(runner, next(stream), run, training, place, rate)
        losses.append(value)
        shown = value if shown is None else LOSS_SMOOTHING * shown + (1 - LOSS_SMOOTHING) * value
        if training.early_stop and evaluate is not None and (run.step % every == 0 or run.step == steps):
            evaluate_and_keep_best(run, module, evaluate)
        if checkpoints and (run.step % checkpoints.every == 0 or run.step == steps):
            state = run.state_dict() if training.sharded or place.is_main else {}
            if place.is_main:
                checkpoints.write(state)
        if report and place.is_main:
            left = (time.perf_counter() - start) / (run.step - first) * (steps - run.step)
            report(
                TrainingProgress(
                    run.step, steps, shown, rate, left, run.best_drift if math.isfinite(run.best_drift) else None
                )
            )
    load_final_weights(run)
    drift = run.best_drift if run.best_weights else None
    return TrainingResult(run.step, losses, drift, time.perf_counter() - start)


def batches_from(batches: BatchSource, step: int) -> Iterator[Batch]:
    """Batches from step ``step`` on."""
    number, first = divmod(step, batches.steps_per_epoch)
    while True:
        yield from batches.epoch(number, first)
        number, first = number + 1, 0


def train_step(
    runner: torch.nn.Module, batch: Batch, run: TrainingState, training: TrainingOptions, place: Worker, rate: float
) -> float:
    """One step; returns the loss, averaged over processes."""
    torch.manual_seed(hash((training.seed, run.step, place.rank)) % 2**63)  # for losses that draw random numbers
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(place.device.type, torch.bfloat16, enabled=uses_bfloat16(training, place.device)):
        value = runner(batch)
    value.backward()
    if training.clip:
        torch.nn.utils.clip_grad_norm_(run.parameters, training.clip)
    run.optimizer.step()
    run.step += 1
    if training.ema:
        decay = min(training.ema, (1 + run.step) / (10 + run.step))  # at first the weights move, and so does this
        with torch.no_grad():
            torch._foreach_lerp_(run.ema_weights, [p.detach() for p in run.parameters], 1 - decay)
    shown = value.detach()
    if place.world_size > 1:
        dist.all_reduce(shown)
        shown = shown / place.world_size
    found = float(shown)
    if not math.isfinite(found):
        raise UserError(f"step {run.step}: the loss is {found}: a smaller --lr, or --precision fp32, may help")
    return found


def make_optimizer(parameters: Sequence[torch.nn.Parameter], training: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW; gains and biases do not decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.lr)


def learning_rate(training: TrainingOptions, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = steps // 20 if training.warmup is None else training.warmup
    if step < warmup:
        return training.lr * (step + 1) / warmup
    return training.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def uses_bfloat16(training: TrainingOptions, device: torch.device) -> bool:
    """bfloat16 helps on GPUs that multiply it; on most CPUs it is slower than float32."""
    if training.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return training.precision == "bf16"


def evaluate_and_keep_best(
    run: TrainingState, module: torch.nn.Module, evaluate: Callable[[torch.nn.Module], float]
) -> None:
    """Evaluate what would be written now, and keep it if it is the best so far."""
    with temporary_weights(run.parameters, run.ema_weights), torch.no_grad():
        drift = evaluate(module)
        better = drift < run.best_drift
        if better:
            run.best_weights = [p.detach().clone() for p in run.parameters]
    run.best_drift, run.evaluations_since_best = (
        (drift, 0) if better else (run.best_drift, run.evaluations_since_best + 1)
    )


def load_final_weights(run: TrainingState) -> None:
    """Leave in the module what is to be written: the best weights, else their average, else the last."""
    with torch.no_grad():
        for parameter, value in zip(run.parameters, run.best_weights or run.ema_weights or run.parameters, strict=True):
            parameter.copy_(value)


@contextmanager
def temporary_weights(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The parameters hold ``values`` (where there are any) while the block runs."""
    if not values:
        yield
        return
    held = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, held, strict=True):
                parameter.copy_(value)
