"""Prune in rounds with training between them: by a fixed schedule, or as far as an objective holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.pipeline.planner import plan
from snpc.pipeline.prune import apply_slice_plan
from snpc.planning.config import Budget, parse_target
from snpc.planning.plan import PruningMethod
from snpc.runtime.calibration.dataset import Calibration
from snpc.runtime.io.atomic import check_target, discard_model, external_data_path, rename_into_place
from snpc.runtime.io.load import load, model_files
from snpc.torch.finetune import finetune
from snpc.torch.pruning.objectives import AccuracyDrop, PruningObjective, max_output_drift
from snpc.torch.pruning.round_log import PruningRound, RoundLog, open_round_log
from snpc.torch.training.checkpoints import CheckpointOptions, run_fingerprint
from snpc.torch.training.options import TrainingOptions

MIN_STEP_DIVISOR = 8  # an adaptive step is halved down to this part of the first one

RoundCallback = Callable[[PruningRound], None]


@dataclass(frozen=True)
class UnitSelection:
    """How units are chosen in every round: see ``plan``."""

    method: PruningMethod | None = None
    criterion: str | None = None


def cubic_schedule(share: float, rounds: int) -> list[float]:
    """What is left of the MACs after each round: s_t = s_f + (s_i - s_f) (1 - t / n)^3 with s the share that is gone,
    from none (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""
    return [1 - (1 - share) * (1 - (1 - t / rounds) ** 3) for t in range(1, rounds + 1)]


def prune_in_rounds(
    source: Path,
    data: Calibration,
    target: Path,
    *,
    goal: str,
    rounds: int = 4,
    way: UnitSelection | None = None,
    training: TrainingOptions | None = None,
    saved: CheckpointOptions | None = None,
    heard: RoundCallback | None = None,
) -> list[PruningRound]:
    """Cut to ``goal`` ("macs=R") along the cubic schedule, ``training`` after each round, and write the last model."""
    share = target_macs(source, target, goal, rounds)
    options = (source, data, way or UnitSelection(), training or TrainingOptions())
    with round_runner(*options, None, saved, ("cubic", goal, rounds), heard) as work:
        for left in cubic_schedule(share, rounds):
            work.run_round(left)
        copy_into_place(work.current_model, target)
        return work.log.rounds


def prune_adaptively(
    source: Path,
    data: Calibration,
    target: Path,
    *,
    goal: str,
    objective: PruningObjective,
    rounds: int = 4,
    way: UnitSelection | None = None,
    training: TrainingOptions | None = None,
    saved: CheckpointOptions | None = None,
    heard: RoundCallback | None = None,
) -> list[PruningRound]:
    """Cut by equal steps towards ``goal`` ("macs=R") for as long as ``objective`` holds after training; where it does
    not, go back to the model before and take half the step, down to an eighth (after AAP, Zhao et al. 2022, arXiv
    2201.10520: prune, test, roll back and tighten).

    Writes the narrowest model that held. Raises UserError where not even the smallest step did.
    """
    share = target_macs(source, target, goal, rounds)
    options = (source, data, way or UnitSelection(), training or TrainingOptions())
    with round_runner(*options, objective, saved, ("adaptive", goal, rounds), heard) as work:
        left, step = 1.0, (1 - share) / rounds
        smallest = step / MIN_STEP_DIVISOR
        while left > share + 1e-9 and step >= smallest * (1 - 1e-9):
            aim = max(share, left - step)
            if work.run_round(aim).kept:
                left = aim
            else:
                step /= 2
        if work.current_model == source:
            raise UserError(f"{source}: no cut keeps {objective}: allow more, or train longer")
        copy_into_place(work.current_model, target)
        return work.log.rounds


@contextmanager
def round_runner(
    source: Path,
    data: Calibration,
    way: UnitSelection,
    training: TrainingOptions,
    objective: PruningObjective | None,
    saved: CheckpointOptions | None,
    schedule: tuple[object, ...],
    heard: RoundCallback | None,
) -> Iterator[RoundRunner]:
    dense = analyze(load(source))
    key = None if objective is None else objective.fingerprint
    run = run_fingerprint(data, dense.model.digest, way, training, schedule, key)
    with open_round_log(saved, run) as notes:
        yield RoundRunner(dense, data, way, training, objective, notes, heard or (lambda found: None))


@dataclass
class RoundRunner:
    """The model so far (``here``) and what rounds are made with. Rounds that the journal has are not made again."""

    dense: Analysis
    data: Calibration
    selection: UnitSelection
    training: TrainingOptions
    objective: PruningObjective | None
    log: RoundLog
    on_round: RoundCallback
    number: int = 0

    def __post_init__(self) -> None:
        self.current_model = self.dense.model.path

    def run_round(self, left: float) -> PruningRound:
        """Cut ``here`` to ``left`` of the dense MACs, train, and go on from there if the objective holds."""
        self.number += 1
        if self.number > len(self.log.rounds):
            self.log.add(self.prune_and_train(left))
        found = self.log.rounds[self.number - 1]
        if found.kept:
            self.current_model = self.log.finetuned_model(self.number)
        self.on_round(found)
        return found

    def prune_and_train(self, left: float) -> PruningRound:
        cut = self.log.pruned_model(self.number)
        if not cut.is_file():
            self.prune(left, cut)
        saved = self.log.checkpoint_options(self.number)
        tuned = finetune(
            cut,
            self.dense.model.path,
            self.data,
            self.log.finetuned_model(self.number),
            training=self.training,
            saved=saved,
        )
        if tuned is None:
            raise UserError("pruning in rounds takes one process")
        if self.objective is None:
            return PruningRound(left, max_output_drift(tuned), kept=True)
        value = self.objective.measure(tuned)
        lost = value if isinstance(self.objective, AccuracyDrop) else None
        return PruningRound(left, max_output_drift(tuned), value <= self.objective.limit, lost)

    def prune(self, left: float, target: Path) -> None:
        analysis = analyze(load(self.current_model), self.dense.dim_sizes)
        share = min(1.0, left * self.dense.cost.macs / analysis.cost.macs)
        found = plan(
            analysis,
            Budget(target=f"macs={share!r}"),
            calibration=self.data,
            method=self.selection.method,
            criterion=self.selection.criterion,
        )
        apply_slice_plan(found.slices, target, compression=found.closed_forms, calibration=self.data)


def target_macs(source: Path, target: Path, goal: str, rounds: int) -> float:
    for path in (target, external_data_path(target)):
        check_target(path, *model_files(source))
    parsed = parse_target(goal)
    if parsed.kind != "macs":
        raise UserError(f"target {goal!r}: schedules cut MACs: give macs=R")
    if rounds < 1:
        raise UserError(f"rounds {rounds}: must be at least 1")
    return parsed.share


def copy_into_place(path: Path, target: Path) -> None:
    """Copy to beside the target, and give the copy its name."""
    temporary = target.with_name(f".{target.name}.unverified.onnx")
    try:
        shutil.copyfile(path, temporary)
        if external_data_path(path).is_file():
            shutil.copyfile(external_data_path(path), external_data_path(temporary))
        rename_into_place(temporary, target)
    finally:
        discard_model(temporary)
