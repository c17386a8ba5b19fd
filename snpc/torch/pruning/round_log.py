"""The log of a schedule's rounds, in a folder beside the models that they made, so that a killed run can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from snpc.runtime.io import atomic_write, discard_model
from snpc.temporary import temporary_folder
from snpc.torch.training import (
    CheckpointOptions,
    invalid_checkpoint_error,
    make_checkpoint_folder,
    other_run_error,
    unexpected_checkpoint_error,
)

ROUND_LOG_FILE = "rounds.json"


NO_CHECKPOINTS = 1 << 30  # steps between checkpoints, of a run that is not resumed


@dataclass(frozen=True)
class PruningRound:
    """``macs``: the share of the dense MACs that the round pruned to. ``drift``: largest relative difference of the
    outputs after training. ``kept``: whether the objective held, so that the next round began with this model.
    ``lost``: accuracy lost, as a share of the samples, where that is the objective."""

    macs: float
    drift: float
    kept: bool
    lost: float | None = None


@dataclass
class RoundLog:
    """The ``rounds`` that are done, of the run that ``run_id`` names. A round has a pruned and a finetuned model, and
    checkpoints while it trains."""

    folder: Path
    run_id: str
    checkpoint_every: int
    rounds: list[PruningRound] = field(default_factory=list)

    def pruned_model(self, number: int) -> Path:
        return self.folder / f"cut{number}.onnx"

    def finetuned_model(self, number: int) -> Path:
        return self.folder / f"tuned{number}.onnx"

    def checkpoint_options(self, number: int) -> CheckpointOptions:
        return CheckpointOptions(self.folder / f"training{number}", self.checkpoint_every, resume=True)

    def write(self) -> None:
        with atomic_write(self.folder / ROUND_LOG_FILE) as temporary:
            temporary.write_text(json.dumps({"run": self.run_id, "rounds": [asdict(r) for r in self.rounds]}))

    def add(self, pruning_round: PruningRound) -> None:
        """Log a round, then remove the files that no later round needs."""
        last_kept = max((k for k, r in enumerate(self.rounds, 1) if r.kept), default=None)
        self.rounds.append(pruning_round)
        number = len(self.rounds)
        self.write()
        discard_model(self.pruned_model(number))
        shutil.rmtree(self.checkpoint_options(number).folder, ignore_errors=True)
        if not pruning_round.kept:
            discard_model(self.finetuned_model(number))
        elif last_kept is not None:
            discard_model(self.finetuned_model(last_kept))


@contextmanager
def open_round_log(options: CheckpointOptions | None, run_id: str) -> Iterator[RoundLog]:
    """The log of a run in its checkpoint folder; without options, in a folder that is removed when the block ends.

    Raises UserError for a log that exists and ``resume`` is not set, and for that of another run.
    """
    if options is None:
        with temporary_folder() as folder:
            yield RoundLog(folder, run_id, NO_CHECKPOINTS)
        return
    make_checkpoint_folder(options)
    path = options.folder / ROUND_LOG_FILE
    rounds = read_rounds(path, run_id, options.resume) if path.is_file() else []
    log = RoundLog(options.folder, run_id, options.every, rounds)
    log.write()  # before the first round, so that another run is refused from the start
    yield log


def read_rounds(path: Path, run_id: str, resume: bool) -> list[PruningRound]:
    if not resume:
        raise unexpected_checkpoint_error(path)
    try:
        content = json.loads(path.read_text())
        rounds = [PruningRound(**r) for r in content["rounds"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise invalid_checkpoint_error(path, error) from None
    if content.get("run") != run_id:
        raise other_run_error(path)
    return rounds
