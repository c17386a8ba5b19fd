"""Pruning in rounds with training between them: along a fixed schedule, or for as long as an objective holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.passes import Analysis, analyze
from snpc.pipeline import apply, plan
from snpc.planning import Budget, PruningMethod, ResourceTarget, parse_target
from snpc.runtime.calibration import Calibration
from snpc.runtime.io import check_target, load, model_files, publish_files, refuse_branches, staging_folder
from snpc.torch.finetune import finetune
from snpc.torch.pruning.objectives import AccuracyDrop, PruningObjective, max_output_drift
from snpc.torch.pruning.round_log import PruningRound, RoundLog, open_round_log
from snpc.torch.training import CheckpointOptions, TrainingOptions, run_fingerprint

DEFAULT_TRAINING = TrainingOptions()
MIN_STEP_DIVISOR = 8  # an adaptive step is halved at most down to the first step divided by this

RoundCallback = Callable[[PruningRound], None]


@dataclass(frozen=True)
class Rounds:
    """How a model is pruned in ``count`` rounds, with ``training`` after each.

    ``target``: the share of the dense MACs to reach, "macs=R" or parsed. ``method`` and ``criterion``: how every round
    selects units, see ``snpc.plan``. ``checkpoints``: where the state is kept, so that a run that was killed can be
    resumed. Raises UserError for other targets, and for fewer than one round.
    """

    target: ResourceTarget | str
    count: int = 4
    method: PruningMethod | None = None
    criterion: str | None = None
    training: TrainingOptions = DEFAULT_TRAINING
    checkpoints: CheckpointOptions | None = None

    def __post_init__(self) -> None:
        target = parse_target(self.target) if isinstance(self.target, str) else self.target
        object.__setattr__(self, "target", target)
        if target.kind != "macs":
            raise UserError(f"schedules prune MACs, not {target.kind}: give macs=R")
        if self.count < 1:
            raise UserError(f"rounds {self.count}: must be at least 1")
        if self.training.sparsify:
            raise UserError("a schedule prunes whole units: leave out --sparsify, and finetune its result with it")

    @property
    def macs_share(self) -> float:
        """The share of the dense MACs to reach."""
        assert isinstance(self.target, ResourceTarget)  # __post_init__ has parsed it
        return self.target.share

    def fingerprint_parts(self) -> tuple[object, ...]:
        """All of it that decides the result."""
        return (self.target, self.count, self.method, self.criterion, self.training)


def cubic_schedule(share: float, rounds: int) -> list[float]:
    """The share of the MACs that is left after each round: s_t = s_f + (s_i - s_f) (1 - t / n)^3 with s the share that
    is removed, none at first (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""
    return [1 - (1 - share) * (1 - (1 - t / rounds) ** 3) for t in range(1, rounds + 1)]


def prune_in_rounds(
    source: Path,
    data: Calibration,
    output: Path,
    rounds: Rounds,
    *,
    on_round: RoundCallback | None = None,
) -> list[PruningRound]:
    """Prune ``source`` to ``rounds.target`` along the cubic schedule, and write the model of the last round."""
    check_output(source, output)
    with open_round_runner(source, data, rounds, None, "cubic") as runner:
        for macs_share in cubic_schedule(rounds.macs_share, rounds.count):
            report_round(on_round, runner.run_round(macs_share))
        copy_into_place(runner.current_model, output)
        return runner.log.rounds


def prune_adaptively(
    source: Path,
    data: Calibration,
    output: Path,
    rounds: Rounds,
    objective: PruningObjective,
    *,
    on_round: RoundCallback | None = None,
) -> list[PruningRound]:
    """Prune by equal steps towards ``rounds.target`` for as long as ``objective`` holds after training. Where it does
    not, go back to the model before and halve the step, down to an eighth of the first (after AAP, Zhao et al. 2022,
    arXiv 2201.10520: prune, test, roll back and tighten).

    ``rounds.count`` steps would reach the target. Writes the smallest model that held. Raises UserError where not even
    the smallest step did.
    """
    check_output(source, output)
    with open_round_runner(source, data, rounds, objective, "adaptive") as runner:
        macs_share, step = 1.0, (1 - rounds.macs_share) / rounds.count
        min_step = step / MIN_STEP_DIVISOR
        while macs_share > rounds.macs_share + 1e-9 and step >= min_step * (1 - 1e-9):
            attempted = max(rounds.macs_share, macs_share - step)
            pruning_round = runner.run_round(attempted)
            report_round(on_round, pruning_round)
            if pruning_round.kept:
                macs_share = attempted
            else:
                step /= 2
        if runner.current_model == source:
            raise UserError(f"{source}: no cut keeps {objective}: allow more, or train longer")
        copy_into_place(runner.current_model, output)
        return runner.log.rounds


def report_round(on_round: RoundCallback | None, pruning_round: PruningRound) -> None:
    if on_round is not None:
        on_round(pruning_round)


@contextmanager
def open_round_runner(
    source: Path, data: Calibration, rounds: Rounds, objective: PruningObjective | None, schedule: str
) -> Iterator[RoundRunner]:
    """A runner whose log is that of this run: of the same model, data, rounds, objective and schedule."""
    dense = analyze(load(source))
    refuse_branches(dense.model, "training")
    objective_fingerprint = None if objective is None else objective.fingerprint
    run_id = run_fingerprint(data, dense.model.digest, *rounds.fingerprint_parts(), schedule, objective_fingerprint)
    with open_round_log(rounds.checkpoints, run_id) as log:
        yield RoundRunner(dense, data, rounds, objective, log)


@dataclass
class RoundRunner:
    """Runs rounds one after the other, each from the model of the last one that was kept (``current_model``). Rounds
    that the log has already are not run again."""

    dense: Analysis
    data: Calibration
    rounds: Rounds
    objective: PruningObjective | None
    log: RoundLog
    number: int = 0

    def __post_init__(self) -> None:
        self.current_model = self.dense.model.path

    def run_round(self, macs_share: float) -> PruningRound:
        """Prune to ``macs_share`` of the dense MACs, train, and keep the result if the objective holds."""
        self.number += 1
        if self.number > len(self.log.rounds):
            self.log.add(self.prune_and_train(macs_share))
        pruning_round = self.log.rounds[self.number - 1]
        if pruning_round.kept:
            self.current_model = self.log.finetuned_model(self.number)
        return pruning_round

    def prune_and_train(self, macs_share: float) -> PruningRound:
        pruned = self.log.pruned_model(self.number)
        if not pruned.is_file():
            self.prune(macs_share, pruned)
        result = finetune(
            pruned,
            self.dense.model.path,
            self.data,
            self.log.finetuned_model(self.number),
            training=self.rounds.training,
            checkpoints=self.log.checkpoint_options(self.number),
        )
        if result is None:
            raise UserError("pruning in rounds takes one process")
        drift = max_output_drift(result)
        if self.objective is None:
            return PruningRound(macs_share, drift, kept=True)
        value = self.objective.measure(result)
        accuracy_drop = value if isinstance(self.objective, AccuracyDrop) else None
        return PruningRound(macs_share, drift, value <= self.objective.limit, accuracy_drop)

    def prune(self, macs_share: float, output: Path) -> None:
        """Prune ``current_model`` to ``macs_share`` of the dense MACs."""
        analysis = analyze(load(self.current_model), self.dense.dim_sizes)
        share = min(1.0, macs_share * self.dense.cost.macs / analysis.cost.macs)
        pruning_plan = plan(
            analysis,
            Budget(target=ResourceTarget("macs", share)),
            self.data,
            method=self.rounds.method,
            criterion=self.rounds.criterion,
            metric=self.rounds.training.metric or None,
        )
        apply(pruning_plan, output)


def check_output(source: Path, output: Path) -> None:
    """Raises UserError where the output cannot be written, or would overwrite the source."""
    check_target(output, *model_files(source))


def copy_into_place(model: Path, output: Path) -> None:
    """Copy a model beside ``output``, then rename the copy into place."""
    with staging_folder(output) as folder:
        for file in model_files(model):
            copy = folder / file.relative_to(model.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        publish_files([folder / model.name], output)
