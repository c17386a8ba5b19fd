"""One model at several sizes: quality and speed of each, and which of them no other one beats."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.pipeline.planner import Decision, decide, uncut
from snpc.pipeline.search import prune
from snpc.pipeline.token_request import AUTO, with_tokens
from snpc.pipeline.token_schedule import Widths, share_of_macs, start
from snpc.planning.config import Choice, is_latency
from snpc.planning.plan import Method
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.accuracy import Evaluation, accuracy, outputs
from snpc.runtime.evaluation.bench import bench
from snpc.runtime.evaluation.compare import compare, pooled, worst
from snpc.runtime.evaluation.latency import Workload
from snpc.runtime.io.atomic import check_target
from snpc.targets.base import Precision
from snpc.targets.build import artefact, build, staging, target_of
from snpc.types import Cost

ORIGINAL = "original"
Step = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One size. ``macs`` and ``params`` are of the pruned ONNX file, the rest of the artefact where one was built.

    ``drift``: outputs against the original's, relative; ``agreement``: share of rows with the same top entry;
    ``accuracy``: share of labels that are the top entry, where labels are given. ``speedup``: over the original, with
    its 95 % interval. ``tokens``: how they get fewer, "" where they do not. ``front``: nothing else is both at least as
    good and at least as fast.
    """

    name: str
    files: tuple[Path, ...]
    macs: int
    params: int
    bytes: int
    drift: float
    agreement: float | None
    accuracy: float | None
    tokens: str = ""
    latency: float = 0.0
    speedup: float = 1.0
    low: float = 1.0
    high: float = 1.0
    front: bool = False

    @property
    def quality(self) -> float:
        """Higher is better: accuracy where it is known, else the closer to the original the better."""
        return self.accuracy if self.accuracy is not None else -self.drift


@dataclass(frozen=True)
class Sweep:
    """All points, the original first, then in the order of the targets. ``folder`` holds the models on the front."""

    model: Path
    folder: Path
    points: tuple[Point, ...]
    batch: int

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(p), "files": [f.name for f in p.files] if p.front else []} for p in self.points]
        return {"snpc_sweep": 1, "model": str(self.model), "batch": self.batch, "latency_unit": "ms", "points": rows}


def sweep(
    analysis: Analysis,
    targets: Sequence[str],
    folder: Path,
    calibration: Calibration,
    *,
    choice: Choice | None,
    tokens: str | None = None,
    evaluation: Evaluation | None = None,
    method: Method | None = None,
    target: str | None = None,
    precision: Precision = "fp32",
    provider: str = "cpu",
    batch: int = 1,
    rounds: int = 30,
    step: Step = lambda text: None,
) -> Sweep:
    """Prune to each of ``targets`` ("macs=0.8"), build these and the original for ``target`` if one is named, judge and
    time all of them in the same rounds, and keep in ``folder`` the models on the Pareto front.

    ``choice``: everything but the target (None: widths stay as they are). ``tokens``: how they get fewer
    (``runtime.token_request``), the same for all targets, or "auto": as is best for each. What is measured on
    ``calibration`` is measured once, or once for every number of tokens. ``step`` is told what comes next,
    ``steps(targets)`` times. Raises UserError for a target that cannot be reached, before anything is written.
    """
    if len(set(targets)) != len(targets) or not targets:
        raise UserError("--targets: give each target once, and at least one")
    check_target(folder / "sweep.json")
    wishes = [Wish(text, replace(choice, target=text) if choice is not None else None) for text in targets]
    options: dict[str, Any] = {"precision": precision, "provider": provider, "calibration": calibration, "batch": batch}
    made_as = artefact(target, **options) if target else None
    workload = Workload(batch=batch, artefact=made_as) if any(w.timed for w in wishes) else None
    judge = evaluation or Evaluation(calibration)
    step("measuring")
    means = Measuring(calibration, method, provider, workload)
    decisions = decided(analysis, wishes, tokens, means)
    with staging(folder / "sweep") as work:
        source = analysis.model.path

        def point(name: str, path: Path, cost: Cost, tokens: str = "") -> Point:
            out = work / path.with_suffix(target_of(target).suffix).name if target else None
            files = build(path, target, out, **options).files if target else (path,)
            total = sum(file.stat().st_size for file in files)
            return Point(name, files, cost.macs, cost.params, total, 0.0, None, None, tokens)

        points = [point(ORIGINAL, source, analysis.cost)]
        for text, (decision, fed) in decisions.items():
            step(text)
            path = work / "work" / f"{source.stem}-{re.sub('[^0-9a-z.]+', '-', text)}.onnx"
            made = prune(decision, path, calibration=fed, provider=provider)
            reduction = decision.plan.analysis.reduction
            points.append(point(text, path, made.after, reduction.spec if reduction is not None else ""))
        step("judging and timing")
        points = timed(judged(points, source, judge, provider), provider, batch, rounds)
        points = on_front(points)
        return Sweep(source, folder, tuple(keep(points, source, folder)), batch)


@dataclass(frozen=True)
class Wish:
    """One target, and the widths to cut for it (None: none)."""

    target: str
    choice: Choice | None

    @property
    def timed(self) -> bool:
        return self.choice is not None and is_latency(self.choice)


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how."""

    calibration: Calibration
    method: Method | None
    provider: str
    workload: Workload | None


Decided = tuple[Decision, Calibration]


def decided(analysis: Analysis, wishes: Sequence[Wish], tokens: str | None, means: Measuring) -> dict[str, Decided]:
    """For each target a decision, and the data that it is carried out with."""
    if tokens is not None and tokens.strip() == AUTO:
        return by_target(analysis, wishes, means)
    if wishes[0].choice is None:
        raise UserError("--roles none leaves nothing to sweep through but --tokens auto")
    reduced, fed = with_tokens(analysis, means.calibration, tokens, provider=means.provider)
    assert fed is not None
    return {text: (decision, fed) for text, decision in measured_once(reduced, wishes, fed, means).items()}


def measured_once(
    analysis: Analysis, wishes: Sequence[Wish], calibration: Calibration, means: Measuring
) -> dict[str, Decision]:
    """Measured for one target (a latency if there is one), planned for each."""
    choices = {wish.target: wish.choice for wish in wishes if wish.choice is not None}
    first = max(choices.values(), key=is_latency)
    made = decide(
        analysis,
        first,
        calibration=calibration,
        method=means.method,
        provider=means.provider,
        workload=means.workload,
        whole=True,
    )
    return {text: made.at(choice) for text, choice in choices.items()}


def by_target(analysis: Analysis, wishes: Sequence[Wish], means: Measuring) -> dict[str, Decided]:
    """As many tokens as are best for each target; what was tried for one serves the next."""
    for wish in wishes:
        share_of_macs(wish.target)
    trials, found = start(analysis, means.calibration, means.provider), {}
    for wish in wishes:
        widths = Widths(wish.choice, means.method) if wish.choice is not None else None
        reduced, fed = with_tokens(
            analysis,
            means.calibration,
            AUTO,
            target=wish.target,
            widths=widths,
            provider=means.provider,
            trials=trials,
        )
        assert fed is not None
        made = measured_once(reduced, [wish], fed, means)[wish.target] if widths is not None else uncut(reduced)
        found[wish.target] = made, fed
    return found


def steps(targets: Sequence[str]) -> int:
    return len(targets) + 2


# -- judging ---------------------------------------------------------------------------------------------------------


def judged(points: Sequence[Point], source: Path, judge: Evaluation, provider: str) -> list[Point]:
    dense = outputs(source, judge, provider)
    found = []
    for point in points:
        mine = dense if point.files[0] == source else outputs(point.files[0], judge, provider)
        moved = pooled([compare(a, b) for a, b in zip(dense, mine, strict=True)])
        found.append(
            replace(point, drift=worst(moved), agreement=moved[0].agreement, accuracy=accuracy(mine, judge.labels))
        )
    return found


def timed(points: Sequence[Point], provider: str, batch: int, rounds: int) -> list[Point]:
    result = bench([point.files[0] for point in points], provider=provider, batch=batch, iterations=rounds)
    found = [replace(points[0], latency=result.timings[0].median)]
    for point, timing, speedup in zip(points[1:], result.timings[1:], result.speedups, strict=True):
        found.append(replace(point, latency=timing.median, speedup=speedup.ratio, low=speedup.low, high=speedup.high))
    return found


def on_front(points: Sequence[Point]) -> list[Point]:
    """Marked: points that no other is at least as good and as fast as, and better in one of the two."""

    def beats(a: Point, b: Point) -> bool:
        pair = (a.quality - b.quality, a.speedup - b.speedup)
        return min(pair) >= 0 and max(pair) > 0

    return [replace(p, front=not any(beats(other, p) for other in points)) for p in points]


def keep(points: Sequence[Point], source: Path, folder: Path) -> list[Point]:
    """Move the files of the front into ``folder``; those of the others go with the temporary folder, and so does what
    was built of the original."""
    found = []
    for point in points:
        if point.name == ORIGINAL:
            point = replace(point, files=(source,))
        elif point.front:
            moved = [Path(shutil.move(file, folder / file.name)) for file in reversed(point.files)]
            point = replace(point, files=tuple(reversed(moved)))
        found.append(point)
    return found
