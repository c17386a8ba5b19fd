"""Prune in rounds with training between them: by a fixed schedule, or as far as an objective holds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.passes.choice import Choice, parse_target
from snpc.passes.plan import Method
from snpc.runtime.calibration.stream import Calibration
from snpc.runtime.compress import decide
from snpc.runtime.model_io import check_target, data_file, load, model_files
from snpc.runtime.prune import apply_plan, discard, publish
from snpc.torch.training import Training
from snpc.torch.tune import Tuned, finetune

SMALLEST = 8  # an adaptive step is halved down to this part of the first one


@dataclass(frozen=True)
class Round:
    """``macs``: share of the dense MACs that was cut to; ``drift``: of the outputs after training, relative; ``kept``:
    did the objective hold, so that the next round went on from here?"""

    macs: float
    drift: float
    kept: bool


@dataclass(frozen=True)
class Way:
    """How units are chosen in every round: see ``decide``."""

    method: Method | None = None
    criterion: str | None = None


def cubic(share: float, rounds: int) -> list[float]:
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
    way: Way | None = None,
    training: Training | None = None,
    heard: Callable[[Round], None] | None = None,
) -> list[Round]:
    """Cut to ``goal`` ("macs=R") along the cubic schedule, ``training`` after each round, and write the last model."""
    share = check(source, target, goal, rounds)
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        work = Work(analyze(load(source)), data, way or Way(), training or Training(), Path(folder))
        found = []
        for left in cubic(share, rounds):
            tuned = work.cut(left)
            work.go_on(tuned)
            found.append(Round(left, drift(tuned), True))
            if heard:
                heard(found[-1])
        hand_over(work.here, target)
    return found


def prune_adaptively(
    source: Path,
    data: Calibration,
    target: Path,
    *,
    goal: str,
    limit: float,
    rounds: int = 4,
    way: Way | None = None,
    training: Training | None = None,
    heard: Callable[[Round], None] | None = None,
) -> list[Round]:
    """Cut by equal steps towards ``goal`` ("macs=R") for as long as the outputs, after training, stay within a drift of
    ``limit``; where they do not, go back to the model before and take half the step, down to an eighth (after AAP,
    Zhao et al. 2022, arXiv 2201.10520: prune, test, roll back and tighten).

    Writes the narrowest model that held. Raises UserError where not even the smallest step did.
    """
    share = check(source, target, goal, rounds)
    if limit <= 0:
        raise UserError(f"drift limit {limit:g}: must be more than 0")
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        work = Work(analyze(load(source)), data, way or Way(), training or Training(), Path(folder))
        found = []
        left, step = 1.0, (1 - share) / rounds
        smallest = step / SMALLEST
        while left > share + 1e-9 and step >= smallest * (1 - 1e-9):
            aim = max(share, left - step)
            tuned = work.cut(aim)
            held = drift(tuned) <= limit
            found.append(Round(aim, drift(tuned), held))
            if heard:
                heard(found[-1])
            if held:
                work.go_on(tuned)
                left = aim
            else:
                step /= 2
        if work.here == source:
            raise UserError(f"{source}: no cut keeps the drift within {limit:g}: allow more, or train longer")
        hand_over(work.here, target)
    return found


@dataclass
class Work:
    """The model so far (``here``) and what rounds are made with."""

    dense: Analysis
    data: Calibration
    way: Way
    training: Training
    folder: Path
    turn: int = 0

    def __post_init__(self) -> None:
        self.here = self.dense.model.path

    def cut(self, left: float) -> Tuned:
        """``here`` cut to ``left`` of the dense MACs and trained, beside it."""
        self.turn += 1
        analysis = analyze(load(self.here), self.dense.binding)
        share = min(1.0, left * self.dense.cost.macs / analysis.cost.macs)
        cut, tuned = self.folder / f"cut{self.turn}.onnx", self.folder / f"tuned{self.turn}.onnx"
        found = decide(
            analysis,
            Choice(target=f"macs={share!r}"),
            calibration=self.data,
            method=self.way.method,
            criterion=self.way.criterion,
        )
        apply_plan(found.plan, cut, compression=found.compression, calibration=self.data)
        result = finetune(cut, self.dense.model.path, self.data, tuned, training=self.training)
        if result is None:
            raise UserError("pruning in rounds takes one process")
        return result

    def go_on(self, tuned: Tuned) -> None:
        self.here = tuned.path


def check(source: Path, target: Path, goal: str, rounds: int) -> float:
    for path in (target, data_file(target)):
        check_target(path, *model_files(source))
    parsed = parse_target(goal)
    if parsed.kind != "macs":
        raise UserError(f"target {goal!r}: schedules cut MACs: give macs=R")
    if rounds < 1:
        raise UserError(f"rounds {rounds}: must be at least 1")
    return parsed.share


def drift(tuned: Tuned) -> float:
    """The largest of the outputs, relative."""
    return max(d.relative for d in tuned.after)


def hand_over(path: Path, target: Path) -> None:
    """Copy to beside the target, and give the copy its name."""
    temporary = target.with_name(f".{target.name}.unverified.onnx")
    try:
        shutil.copyfile(path, temporary)
        if data_file(path).is_file():
            shutil.copyfile(data_file(path), data_file(temporary))
        publish(temporary, target)
    finally:
        discard(temporary)
