"""The verbs: prune in one call, or plan, apply and verify in steps. The command line is a thin skin over these."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from snpc.graph.shapes import infer_graph
from snpc.passes.analyze import Analysis, cost_of
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.pipeline.refit import FitInputs, with_refitted_weights
from snpc.pipeline.verify import verify_candidate
from snpc.planning.plan import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.fit import ClosedForms
from snpc.runtime.closed_form.refit_normalizations import approximate_groups
from snpc.runtime.evaluation.compare import (
    raise_if_unequal,
)
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.io.atomic import check_target, discard_model, external_data_path, rename_into_place
from snpc.runtime.io.load import file_bytes, load, model_files
from snpc.runtime.io.save import save
from snpc.types import ClosedFormKind, Cost, Verdict


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
class SearchResult:
    """Plans that were applied and measured: ``tried`` holds (predicted, measured) of each, in order. ``kind`` "drift":
    relative root mean square change of the outputs; "latency": share of the dense model's time, or ms."""

    kind: Literal["drift", "latency"]
    unit: str
    limit: float
    reached: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PrunedModel:
    """A written pruned model: costs read from the two files, and what verification found."""

    plan: SlicePlan
    path: Path
    before: Cost
    after: Cost
    verification: Verdict
    seconds: Mapping[str, float]
    calibration: str = ""
    closed_forms: Mapping[str, ClosedFormKind] = field(default_factory=dict)
    """Group id -> the closed form with which it was pruned."""
    search: SearchResult | None = None
    """How a drift or a latency was met, where the plan had to be found by trying."""


def apply_slice_plan(
    plan: SlicePlan,
    target: Path,
    *,
    compression: ClosedForms | None = None,
    calibration: Calibration | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    watch: Stopwatch | None = None,
) -> PrunedModel:
    """Rewrite the plan's model, write it to ``target``, and verify the file before it gets that name.

    A plan of method "auto" needs the ``compression`` that it was made from, to refit the weights before the cut, and
    the calibration data. ``execution.memory_limit``: see ``fit_layerwise``.

    Raises UserError where ``target`` cannot be written, CheckFailed where the result does not hold (then nothing is
    left at ``target``).
    """
    watch = watch or Stopwatch()
    means = FitInputs(compression, calibration, execution)
    temporary = temporary_path(target)
    try:
        made = write_candidate(plan, target, temporary, means, watch)
        return publish_candidate(made, target, means, watch)
    finally:
        discard_model(temporary)


def temporary_path(target: Path, turn: int = 0) -> Path:
    """Where a model lies until it is verified."""
    return target.with_name(f".{target.name}.unverified{turn or ''}.onnx")


@dataclass(frozen=True)
class CandidateModel:
    """A verified model under a temporary name."""

    plan: SlicePlan
    path: Path
    after: Cost
    verdict: Verdict
    closed_forms: Mapping[str, ClosedFormKind]

    @property
    def drift(self) -> float:
        """The largest relative root mean square change of an output."""
        return max((d.relative for d in self.verdict.drift), default=0.0)


def write_candidate(
    plan: SlicePlan, target: Path, temporary: Path, means: FitInputs, watch: Stopwatch
) -> CandidateModel:
    """Rewrite the plan's model for ``target``, write it to ``temporary`` and verify it there; see
    ``apply_slice_plan``."""
    analysis = plan.analysis
    for path in (target, external_data_path(target)):
        check_target(path, *model_files(analysis.model.path))
    source = analysis.traced_graph
    if plan.method != "select":
        with watch.stage("refit"):
            plan, source = with_refitted_weights(plan, means)
    with watch.stage("rewrite"):
        rewritten = rewrite_model(source, cuts_of(plan))
        if analysis.reduction is not None:
            analysis.reduction.finalize(rewritten.model)
        finalize(rewritten.model)
    with watch.stage("write"):
        save(rewritten.model, temporary, analysis.model.external)
    with watch.stage("verify"):
        verdict = verify_candidate(rewritten, plan, temporary, means.calibration, means.execution)
        raise_if_unequal(verdict)
    with watch.stage("report"):
        after = cost_of_file(temporary, analysis)
    compression = means.closed_forms
    kinds = {**compression.kinds} if compression is not None and plan.method != "select" else {}
    kinds |= {group.id: "refit" for group in approximate_groups(plan) if plan.method != "select"}
    return CandidateModel(plan, temporary, after, verdict, kinds)


def publish_candidate(
    made: CandidateModel, target: Path, means: FitInputs, watch: Stopwatch, search: SearchResult | None = None
) -> PrunedModel:
    """Give the model its name."""
    analysis = made.plan.analysis
    with watch.stage("write"):
        rename_into_place(made.path, target)
    after = replace(made.after, bytes=file_bytes(target))
    before = Cost(analysis.cost.params, analysis.cost.macs, file_bytes(analysis.model.path), analysis.cost.nodes)
    seconds = dict(watch.seconds)
    return PrunedModel(
        made.plan, target, before, after, made.verdict, seconds, means.describe_data(), made.closed_forms, search
    )


def cost_of_file(path: Path, analysis: Analysis) -> Cost:
    """Parameters, MACs, bytes and nodes of the file as it lies on disk."""
    model = load(path)
    if analysis.reduction is not None:
        analysis.reduction.name_decision_sizes(model.graph)
    cost = cost_of(model.graph, infer_graph(model.graph, dict(analysis.dim_sizes)))
    return Cost(cost.params, cost.macs, file_bytes(path), cost.nodes)


# -- the JSON report: an interface -----------------------------------------------------------------------------------
