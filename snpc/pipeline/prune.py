"""The verbs: prune in one call, or plan, apply and verify in steps. The command line is a thin skin over these."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from snpc.graph.shapes import evaluate
from snpc.passes.analyze import Analysis, cost_of
from snpc.passes.canonicalization.finalize import clean
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.pipeline.refit import Means, fitted
from snpc.pipeline.verify import verify_written
from snpc.planning.plan import Plan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.fit import Compression
from snpc.runtime.closed_form.refit_normalizations import approximated
from snpc.runtime.evaluation.compare import (
    judge,
)
from snpc.runtime.io.atomic import check_target, data_file, discard, publish
from snpc.runtime.io.load import file_bytes, load, model_files
from snpc.runtime.io.save import save
from snpc.types import Cost, Verdict


@dataclass
class Stopwatch:
    """Seconds per stage, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Search:
    """Plans that were applied and measured: ``tried`` holds (predicted, measured) of each, in order. ``kind`` "drift":
    relative root mean square change of the outputs; "latency": share of the dense model's time, or ms."""

    kind: Literal["drift", "latency"]
    unit: str
    limit: float
    reached: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Pruned:
    """A written pruned model: costs read from the two files, and what verification found."""

    plan: Plan
    path: Path
    before: Cost
    after: Cost
    verdict: Verdict
    seconds: Mapping[str, float]
    calibration: str = ""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Closed form of each group that was refitted: "scores", "values" (rotated), "refit" (what reads it) or
    "coupled" (selected by what the scores lose)."""
    search: Search | None = None
    """How a drift or a latency was met, where the plan had to be found by trying."""


def apply_plan(
    plan: Plan,
    target: Path,
    *,
    compression: Compression | None = None,
    calibration: Calibration | None = None,
    memory_limit: int | None = None,
    provider: str = "cpu",
    watch: Stopwatch | None = None,
) -> Pruned:
    """Rewrite the plan's model, write it to ``target``, and verify the file before it gets that name.

    A plan of method "auto" needs the ``compression`` that it was made from, to refit the weights before the cut, and
    the calibration data. ``memory_limit``: see ``sequential.fit_sequentially``.

    Raises UserError where ``target`` cannot be written, CheckFailed where the result does not hold (then nothing is
    left at ``target``).
    """
    watch = watch or Stopwatch()
    means = Means(compression, calibration, memory_limit, provider)
    temporary = unverified(target)
    try:
        made = build(plan, target, temporary, means, watch)
        return published(made, target, means, watch)
    finally:
        discard(temporary)


def unverified(target: Path, turn: int = 0) -> Path:
    """Where a model lies until it is verified."""
    return target.with_name(f".{target.name}.unverified{turn or ''}.onnx")


@dataclass(frozen=True)
class Candidate:
    """A verified model under a temporary name."""

    plan: Plan
    path: Path
    after: Cost
    verdict: Verdict
    forms: Mapping[str, str]

    @property
    def drift(self) -> float:
        """The largest relative root mean square change of an output."""
        return max((d.relative for d in self.verdict.drift), default=0.0)


def build(plan: Plan, target: Path, temporary: Path, means: Means, watch: Stopwatch) -> Candidate:
    """Rewrite the plan's model for ``target``, write it to ``temporary`` and verify it there; see ``apply_plan``."""
    analysis = plan.analysis
    for path in (target, data_file(target)):
        check_target(path, *model_files(analysis.model.path))
    source = analysis.traced
    if plan.method != "select":
        with watch.stage("refit"):
            plan, source = fitted(plan, means)
    with watch.stage("rewrite"):
        rewritten = rewrite_model(source, cuts_of(plan))
        if analysis.reduction is not None:
            analysis.reduction.finish(rewritten.model)
        clean(rewritten.model)
    with watch.stage("write"):
        save(rewritten.model, temporary, analysis.model.external)
    with watch.stage("verify"):
        verdict = verify_written(rewritten, plan, temporary, means.calibration, means.provider)
        judge(verdict)
    with watch.stage("report"):
        after = written_cost(temporary, analysis)
    compression = means.compression
    forms = {**compression.forms} if compression is not None and plan.method != "select" else {}
    forms |= {group.id: "refit" for group in approximated(plan) if plan.method != "select"}
    return Candidate(plan, temporary, after, verdict, forms)


def published(made: Candidate, target: Path, means: Means, watch: Stopwatch, search: Search | None = None) -> Pruned:
    """Give the model its name."""
    analysis = made.plan.analysis
    with watch.stage("write"):
        publish(made.path, target)
    after = replace(made.after, bytes=file_bytes(target))
    before = Cost(analysis.cost.params, analysis.cost.macs, file_bytes(analysis.model.path), analysis.cost.nodes)
    seconds = dict(watch.seconds)
    return Pruned(made.plan, target, before, after, made.verdict, seconds, means.described(), made.forms, search)


def written_cost(path: Path, analysis: Analysis) -> Cost:
    """Parameters, MACs, bytes and nodes of the file as it lies on disk."""
    model = load(path)
    if analysis.reduction is not None:
        analysis.reduction.mark(model.graph)
    cost = cost_of(model.graph, evaluate(model.graph, dict(analysis.binding)))
    return Cost(cost.params, cost.macs, file_bytes(path), cost.nodes)


# -- the JSON report: an interface -----------------------------------------------------------------------------------
