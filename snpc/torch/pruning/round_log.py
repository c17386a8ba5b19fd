"""The rounds of a schedule, kept in a folder together with what they made, so that a run that was killed goes on."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from snpc.runtime.io.atomic import atomic_write, discard_model
from snpc.torch.training.checkpoints import (
    CheckpointOptions,
    invalid_checkpoint_error,
    make_checkpoint_folder,
    other_run_error,
    unexpected_checkpoint_error,
)

ROUND_LOG_FILE = "rounds.json"


@dataclass(frozen=True)
class PruningRound:
    """``macs``: share of the dense MACs that was cut to; ``drift``: of the outputs after training, relative; ``kept``:
    did the objective hold, so that the next round went on from here? ``lost``: accuracy lost, as a share of the
    samples, where that is the objective."""

    macs: float
    drift: float
    kept: bool
    lost: float | None = None


@dataclass
class RoundLog:
    """``rounds`` that are done, of the run that ``run`` names. Each has a cut model, a tuned one, and while it lasts
    the state of its training."""

    folder: Path
    run_id: str
    checkpoint_every: int
    rounds: list[PruningRound] = field(default_factory=list)

    def pruned_model(self, turn: int) -> Path:
        return self.folder / f"cut{turn}.onnx"

    def finetuned_model(self, turn: int) -> Path:
        return self.folder / f"tuned{turn}.onnx"

    def checkpoint_options(self, turn: int) -> CheckpointOptions:
        return CheckpointOptions(self.folder / f"training{turn}", self.checkpoint_every, resume=True)

    def write(self) -> None:
        with atomic_write(self.folder / ROUND_LOG_FILE) as temporary:
            temporary.write_text(json.dumps({"run": self.run_id, "rounds": [asdict(r) for r in self.rounds]}))

    def add(self, found: PruningRound) -> None:
        """Note a round, then remove what nothing needs any more."""
        before = max((k for k, r in enumerate(self.rounds, 1) if r.kept), default=None)
        self.rounds.append(found)
        turn = len(self.rounds)
        self.write()
        discard_model(self.pruned_model(turn))
        shutil.rmtree(self.checkpoint_options(turn).folder, ignore_errors=True)
        if not found.kept:
            discard_model(self.finetuned_model(turn))
        elif before is not None:
            discard_model(self.finetuned_model(before))


@contextmanager
def open_round_log(saved: CheckpointOptions | None, run: str) -> Iterator[RoundLog]:
    """The journal of a run in its folder, or in one that goes when the block ends. Raises UserError for one that is
    there and was not asked for, or of another run."""
    if saved is None:
        with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
            yield RoundLog(Path(folder), run, 1 << 30)
        return
    make_checkpoint_folder(saved)
    path = saved.folder / ROUND_LOG_FILE
    noted = read_rounds(path, run, saved.resume) if path.is_file() else []
    found = RoundLog(saved.folder, run, saved.every, noted)
    found.write()  # before the first round, so that another run is refused from the start
    yield found


def read_rounds(path: Path, run: str, resume: bool) -> list[PruningRound]:
    if not resume:
        raise unexpected_checkpoint_error(path)
    try:
        found = json.loads(path.read_text())
        rounds = [PruningRound(**r) for r in found["rounds"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise invalid_checkpoint_error(path, error) from None
    if found.get("run") != run:
        raise other_run_error(path)
    return rounds
