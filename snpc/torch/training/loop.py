"""The training loop: a module, a loss, batches and a number of steps. It knows nothing of pruning or teachers.

Every step is a function of the weights, the optimizer's state, the step's number and the seed. A run that was killed
therefore resumes from its last checkpoint to the same weights, bit for bit on a CPU (GPUs add in varying order).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from snpc.torch.training.sparsity import decay_insensitive, kept_zeros

LOSS_SMOOTHING = 0.9  # decay of the moving average that progress shows


class BatchSource(Protocol):
    """A training set. ``epoch`` gives the batches of epoch ``number`` from batch ``first`` on, always the same ones."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, number: int, first: int) -> Iterator[Batch]: ...


@dataclass
class TrainingState:
    """The state of a run between two steps: all that a checkpoint holds.

    ``ema_weights`` (the moving average) and ``best_weights`` are in the order of ``parameters``, and empty where the
    run keeps none. ``best_drift`` is the lowest value of the evaluations, and ``best_step`` the step at which it was.
    """

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    ema_weights: list[torch.Tensor] = field(default_factory=list)
    best_weights: list[torch.Tensor] = field(default_factory=list)
    best_drift: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, gathered from all processes: every process has to call this. The keys are a file format."""
        return {
            "step": self.step,
            "weights": gather_tensors([p.detach() for p in self.parameters]),
            "optimiser": gather_tensors(self.optimizer.state_dict()),
            "average": gather_tensors(self.ema_weights),
            "best": gather_tensors(self.best_weights),
            "drift": self.best_drift,
            "best_step": self.best_step,
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
        self.best_step = state["best_step"]


class LossModule(torch.nn.Module):
    """A module together with its loss: DistributedDataParallel wraps it, and sees the value to differentiate."""

    def __init__(self, module: torch.nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.loss(self.module, batch).mean() * batch.weight


@dataclass(frozen=True)
class TrainingResult:
    """``losses``: of every step that ran here. ``drift``: the evaluation of the weights that the module is left with,
    the best ones, None without any, and ``best_step``: the step after which it was, 0 for the weights that training
    began with."""

    steps: int
    losses: Sequence[float]
    drift: float | None
    seconds: float
    best_step: int | None = None


@dataclass(frozen=True)
class TrainingHooks:
    """What is called while training.

    ``evaluate``: decides which weights are kept, lower is better, and when training stops early; every process calls
    it. ``keep_best``: false where it also changes the weights; those of the last evaluation are then kept.
    ``checkpoints``: where the state is written, and resumed from. ``on_progress``: called after every step by the
    main process.
    """

    evaluate: Callable[[torch.nn.Module], float] | None = None
    checkpoints: CheckpointFile | None = None
    on_progress: TrainingCallback | None = None
    keep_best: bool = True


NO_HOOKS = TrainingHooks()


def train(
    module: torch.nn.Module,
    loss: LossFunction,
    batches: BatchSource,
    training: TrainingOptions,
    *,
    worker: Worker | None = None,
    parameters: Sequence[torch.nn.Parameter] | None = None,
    hooks: TrainingHooks = NO_HOOKS,
) -> TrainingResult:
    """Train ``parameters`` (default: all) of ``module`` in place for ``training.steps`` steps, or else ``epochs``.

    With ``training.sharded`` the module is left sharded: see ``copy_gathered_weights``. Raises UserError where the loss
    is no longer finite.
    """
    worker = worker or Worker(torch.device("cpu"))
    if training.sharded:
        shard_module(module, worker)
    trained = [p for p in (parameters or module.parameters()) if p.requires_grad]
    state = initial_state(trained, training, hooks.checkpoints, worker)
    loss_module = distributed_module(LossModule(module, loss), training, worker)
    steps = training.steps or training.epochs * batches.steps_per_epoch
    evaluate_every = training.evaluate or max(1, min(batches.steps_per_epoch, steps // 20))
    evaluate = hooks.evaluate
    losses: list[float] = []
    monitor = ProgressMonitor(steps, state.step)
    if evaluate is not None and hooks.keep_best and not state.step:
        evaluate_and_keep_best(state, module, evaluate)  # the initial weights may be the best
    stream = batches_from(batches, state.step)
    while state.step < steps and not (training.early_stop and state.evaluations_since_best >= training.early_stop):
        rate = learning_rate(training, state.step, steps)
        losses.append(train_step(loss_module, next(stream), state, training, worker, rate))
        if evaluate is not None and (state.step % evaluate_every == 0 or state.step == steps):
            if hooks.keep_best:
                evaluate_and_keep_best(state, module, evaluate)
            else:
                evaluate_last(state, module, evaluate)
        if hooks.checkpoints and (state.step % hooks.checkpoints.every == 0 or state.step == steps):
            write_checkpoint(hooks.checkpoints, state, training, worker)
        progress = monitor.progress(state, losses[-1], rate)
        if hooks.on_progress and worker.is_main:
            hooks.on_progress(progress)
    load_final_weights(state)
    if not math.isfinite(state.best_drift):
        return TrainingResult(state.step, losses, None, monitor.seconds())
    return TrainingResult(state.step, losses, state.best_drift, monitor.seconds(), state.best_step)


def initial_state(
    parameters: list[torch.nn.Parameter], training: TrainingOptions, checkpoints: CheckpointFile | None, worker: Worker
) -> TrainingState:
    """The state before the first step, or that of the checkpoint, if there is one."""
    state = TrainingState(parameters, make_optimizer(parameters, training))
    if training.ema:
        state.ema_weights = [p.detach().clone() for p in parameters]
    saved = checkpoints.read(worker.device) if checkpoints else None
    if saved is not None:
        state.load_state_dict(saved)
    return state


def distributed_module(module: LossModule, training: TrainingOptions, worker: Worker) -> torch.nn.Module:
    """The module, with its gradients averaged over processes where there are several (FSDP averages by itself)."""
    if worker.world_size == 1 or training.sharded:
        return module
    devices = [worker.device] if worker.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True
    )


def write_checkpoint(
    checkpoints: CheckpointFile, state: TrainingState, training: TrainingOptions, worker: Worker
) -> None:
    """Sharded tensors are gathered by every process; the main process writes."""
    content = state.state_dict() if training.sharded or worker.is_main else {}
    if worker.is_main:
        checkpoints.write(content)


@dataclass
class ProgressMonitor:
    """A smoothed loss, and the time that is left, of a run of ``steps`` steps that began at step ``first``."""

    steps: int
    first: int
    smoothed: float | None = None
    start: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def progress(self, state: TrainingState, loss: float, rate: float) -> TrainingProgress:
        smoothed = loss if self.smoothed is None else LOSS_SMOOTHING * self.smoothed + (1 - LOSS_SMOOTHING) * loss
        self.smoothed = smoothed
        seconds_left = self.seconds() / (state.step - self.first) * (self.steps - state.step)
        drift = state.best_drift if math.isfinite(state.best_drift) else None
        return TrainingProgress(state.step, self.steps, smoothed, rate, seconds_left, drift)


def batches_from(batches: BatchSource, step: int) -> Iterator[Batch]:
    """The batches of step ``step`` and all later ones, epoch after epoch without end."""
    number, first = divmod(step, batches.steps_per_epoch)
    while True:
        yield from batches.epoch(number, first)
        number, first = number + 1, 0


def train_step(
    loss_module: torch.nn.Module,
    batch: Batch,
    state: TrainingState,
    training: TrainingOptions,
    worker: Worker,
    rate: float,
) -> float:
    """One step with learning rate ``rate``. Returns the loss, averaged over processes."""
    torch.manual_seed(hash((training.seed, state.step, worker.rank)) % 2**63)  # for losses that draw random numbers
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(worker.device.type, torch.bfloat16, enabled=uses_bfloat16(training, worker.device)):
        loss = loss_module(batch)
    loss.backward()
    if training.regularize == "lobster":  # it compares gradients with one: as they are, before clipping
        decay_insensitive(state.parameters, rate * training.decay)
    if training.clip:
        torch.nn.utils.clip_grad_norm_(state.parameters, training.clip)
    with kept_zeros(state.parameters) if training.sparsify else nullcontext():
        state.optimizer.step()
    state.step += 1
    if training.ema:
        decay = min(training.ema, (1 + state.step) / (10 + state.step))  # early weights change fast: average fewer
        with torch.no_grad():
            torch._foreach_lerp_(state.ema_weights, [p.detach() for p in state.parameters], 1 - decay)
    mean = loss.detach()
    if worker.world_size > 1:
        dist.all_reduce(mean)
        mean = mean / worker.world_size
    value = float(mean)
    if not math.isfinite(value):
        raise UserError(f"step {state.step}: the loss is {value}: a smaller --lr, or --precision fp32, may help")
    return value


def make_optimizer(parameters: Sequence[torch.nn.Parameter], training: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW; gains and biases do not decay, and with "lobster" no weight decays in here."""
    decay = training.decay if training.regularize == "decay" else 0.0
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
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
    state: TrainingState, module: torch.nn.Module, evaluate: Callable[[torch.nn.Module], float]
) -> None:
    """Evaluate the weights that would be written now, and keep them if they are the best so far."""
    with temporary_weights(state.parameters, state.ema_weights), torch.no_grad():
        drift = evaluate(module)
        if drift < state.best_drift:
            state.best_weights = [p.detach().clone() for p in state.parameters]
            state.best_drift, state.best_step, state.evaluations_since_best = drift, state.step, 0
        else:
            state.evaluations_since_best += 1


def evaluate_last(state: TrainingState, module: torch.nn.Module, evaluate: Callable[[torch.nn.Module], float]) -> None:
    """Evaluate, and perhaps change, the weights as they are."""
    with torch.no_grad():
        state.best_drift, state.best_step = evaluate(module), state.step


def load_final_weights(state: TrainingState) -> None:
    """Leave in the module the weights to be written: the best, else their moving average, else the last."""
    final = state.best_weights or state.ema_weights or state.parameters
    with torch.no_grad():
        for parameter, value in zip(state.parameters, final, strict=True):
            parameter.copy_(value)


@contextmanager
def temporary_weights(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The parameters hold ``values`` (where there are any) while the block runs, then their own values again."""
    if not values:
        yield
        return
    own_values = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own_values, strict=True):
                parameter.copy_(value)
