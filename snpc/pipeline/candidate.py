"""Candidates: pruned models written into a staging folder and verified, before they are renamed into place."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from snpc.errors import CheckFailed
from snpc.graph import cost_of, infer_graph
from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.passes.slicing import rewrite_as_stored
from snpc.pipeline.companions import FittedPlan, WrittenCompanion, write_companions, write_merged
from snpc.pipeline.planner import PruningPlan
from snpc.pipeline.refit import with_refitted_weights
from snpc.pipeline.verify import Reference, candidate_reference, verify_candidate
from snpc.planning import (
    ProvenanceStep,
    SlicePlan,
    complete_step,
    cuts_of,
    parse_target,
    pruning_provenance,
    read_provenance,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form import approximate_groups
from snpc.runtime.evaluation import cache_bytes_per_token
from snpc.runtime.execution import SILENT, Progress
from snpc.runtime.io import (
    check_target,
    file_bytes,
    load,
    model_files,
    publish_files,
    read_back,
    save,
    staging_folder,
)
from snpc.runtime.statistics import SampledRows
from snpc.temporary import TemporaryFolder
from snpc.types import ClosedFormKind, Cost, Model, Quality, TaskChange, TensorSpec, Verdict

if TYPE_CHECKING:
    from snpc.runtime.io import InMemoryModel

TARGET_MARGIN = 5e-4  # of the dense model: what shows as the target, rounded, has met it


@dataclass
class Stopwatch:
    """Seconds per stage, in the order in which they ran. ``progress`` hears of them."""

    progress: Progress = SILENT
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.progress.stage(name, 1) as advance:
                yield
                advance(1)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class SearchResult:
    """Plans that were written and measured on the way to a limit.

    ``kind`` "drift": change of the outputs, relative or by the user's metric; "perplexity": itself, or as a multiple of
    the dense model's; "drop": points of the score on labels; "latency": share of the dense model's time, or ms.
    ``tried``: (predicted, measured) of each plan, in order.
    """

    kind: Literal["drift", "perplexity", "drop", "latency"]
    unit: str
    limit: float
    reached: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model that was verified: costs read from the two files, and the differences of their outputs.

    ``path``: the written file; of a model that was not to be written, a temporary file that is deleted with this value.
    """

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
    """How a drift or a latency was met, where candidates had to be measured for it."""
    folder: TemporaryFolder | None = field(default=None, repr=False, compare=False)
    data: Calibration | None = field(default=None, repr=False, compare=False)
    inputs: tuple[TensorSpec, ...] = ()
    """Of the pruned model; caches may be narrower than the original's."""
    sampled_rows: tuple[SampledRows, ...] = ()
    """Where second moments are not from all rows of the calibration data."""
    companions: tuple[WrittenCompanion, ...] = ()
    """Models with the same weights that were cut alike, and written beside it."""
    task: TaskChange | None = None
    """The score on labels, where there were some."""

    @property
    def provenance(self) -> tuple[ProvenanceStep, ...]:
        """The steps that made the written file, as it says them itself."""
        model = self.plan.analysis.model
        cut = complete_step(model, pruning_provenance(self.plan, self.calibration))
        return (*read_provenance(model.graph), cut)

    @property
    def missed_target(self) -> str:
        """The target in MACs, parameters or bytes and the share that is left, in words; "" where that is not more."""
        given = self.plan.options.get("target")
        target = parse_target(str(given)) if given is not None else None
        if target is None or target.kind == "latency":
            return ""
        left = getattr(self.after, target.kind) / getattr(self.before, target.kind)
        why = ": names and nodes take bytes beside the weights" if target.kind == "bytes" else ""
        return f"{target} is missed: {left:.3f} is left{why}" if left > target.share + TARGET_MARGIN else ""

    @property
    def quality(self) -> Quality:
        """How close the outputs are to the original's."""
        return self.verification.quality

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of the key/value caches per token, before and after; 0 of a model without caches."""
        pairs = [(self.plan.analysis.model.inputs, self.inputs)]
        pairs += [(companion.original.inputs, companion.inputs) for companion in self.companions]
        before, after = ([cache_bytes_per_token(inputs) for inputs in side] for side in zip(*pairs, strict=True))
        return max(before), max(after)

    @property
    def head_size(self) -> tuple[int, int] | None:
        """Channels per head of the fused nodes that take one head size, before and after, where it becomes smallest;
        None where there is no such node, or none is cut."""
        tied = [g for g in self.plan.analysis.groups if g.tie and g.id in self.plan.keep]
        sizes = [(g.size * g.channels, self.plan.kept_width(g) * g.channels) for g in tied]
        return min(sizes, key=lambda size: size[1], default=None)

    @property
    def model(self) -> Path | InMemoryModel:
        """The pruned model as the type that ``load`` took: ``onnx.ModelProto``, ``onnx_ir.Model`` or a graph of
        onnx-graphsurgeon. Of a path: the path of the written file, an ``onnx.ModelProto`` where none was written."""
        kind = self.plan.analysis.model.kind
        if kind == "file" and self.folder is None:
            return self.path
        return read_back(self.path, kind)


@dataclass(frozen=True)
class CandidateModel:
    """A verified model in a staging folder, with its ``inputs``. ``reference``: what it was compared with.
    ``companions``: those of the model, cut alike, in the same folder."""

    slices: SlicePlan
    path: Path
    inputs: tuple[TensorSpec, ...]
    after: Cost
    verdict: Verdict
    closed_forms: Mapping[str, ClosedFormKind]
    reference: Reference = field(repr=False)
    companions: tuple[WrittenCompanion, ...] = ()

    @property
    def drift(self) -> float:
        """The largest drift of an output."""
        return self.verdict.quality.drift


@contextmanager
def staging_folder_for(plan: PruningPlan, target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``. Raises UserError where that is an input, or cannot be written.

    CheckFailed about a file in the folder names ``target``: the folder is gone when a user reads it.
    """
    model = plan.analysis.model
    beside = model.companions if model.merged is None else model.companions[1:]  # the first is in the same file
    inputs = set().union(*(model_files(part.merged or part.path) for part in (model, *beside)))
    for output in (target, *(target.parent / companion.source.name for companion in beside)):
        check_target(output, *inputs)
    with staging_folder(target) as folder:
        try:
            yield folder
        except CheckFailed as error:
            staged = re.escape(str(folder)) + r"(?:/\d+)?/([^/\s:]+)"
            raise CheckFailed(re.sub(staged, lambda m: str(target.parent / m[1]), str(error))) from None


def write_candidate(
    plan: PruningPlan, temporary: Path, stopwatch: Stopwatch, reference: Reference | None = None
) -> CandidateModel:
    """Refit, slice and write the model to ``temporary``, and verify that file. ``reference``: of another candidate.

    Raises CheckFailed where the file does not hold.
    """
    analysis, refits = plan.analysis, plan.slices.method != "select"
    slices, source = plan.slices, analysis.traced_graph
    if refits:
        with stopwatch.stage("refit"):
            slices, source = with_refitted_weights(plan)
    fitted = FittedPlan(slices, source, plan.data_source)
    with stopwatch.stage("rewrite"):
        rewritten, graph = rewrite_as_stored(analysis.model, source, cuts_of(slices), plan.execution.observer)
        if analysis.reduction is not None:
            analysis.reduction.finalize(graph)
        finalize(graph, plan.execution.observer)
        fitted.sign(graph)
    with stopwatch.stage("write"):
        save(graph, temporary, analysis.model.external)
    with stopwatch.stage("verify"):
        reference = reference or candidate_reference(plan)
        verdict = verify_candidate(temporary, rewritten, reference, plan)
        companions = write_companions(fitted, temporary, plan.execution)
        verdict = replace(verdict, structure=(*verdict.structure, *(c.holds for c in companions)))
    with stopwatch.stage("report"):
        written = load(temporary)
        after = cost_of_file(written, analysis)
    kinds = {**plan.closed_forms.kinds} if plan.closed_forms is not None and refits else {}
    kinds |= {group.id: "refit" for group in approximate_groups(slices) if refits}
    return CandidateModel(slices, temporary, written.inputs, after, verdict, kinds, reference, companions)


def publish_candidate(
    candidate: CandidateModel,
    plan: PruningPlan,
    target: Path,
    stopwatch: Stopwatch,
    search: SearchResult | None = None,
) -> PrunedModel:
    """Rename the verified file, and its external data, to their places."""
    analysis = plan.analysis
    with stopwatch.stage("write"):
        candidate = with_merged_file(candidate, plan, target.name)
        publish_files([candidate.path, *(c.path for c in candidate.companions if c.path != candidate.path)], target)
    return PrunedModel(
        candidate.slices,
        target,
        replace(analysis.cost, bytes=file_bytes(analysis.model.merged or analysis.model.path)),
        replace(candidate.after, bytes=file_bytes(target)),
        candidate.verdict,
        dict(stopwatch.seconds),
        plan.data_source,
        candidate.closed_forms,
        search,
        data=plan.calibration,
        inputs=candidate.inputs,
        sampled_rows=plan.statistics.sampled_rows if plan.statistics is not None else (),
        companions=tuple(replace(c, path=target.parent / c.path.name) for c in candidate.companions),
    )


def with_merged_file(candidate: CandidateModel, plan: PruningPlan, name: str) -> CandidateModel:
    """Of a merged decoder, the candidate with one file called ``name`` in place of those of its branches."""
    model = plan.analysis.model
    if model.merged is None:
        return candidate
    second, *others = candidate.companions
    path = candidate.path.parent / "merged" / name
    holds = write_merged(model, (candidate.path, second.path), path, plan.execution)
    verdict = replace(candidate.verdict, structure=(*candidate.verdict.structure, holds))
    return replace(candidate, path=path, verdict=verdict, companions=(replace(second, path=path), *others))


def cost_of_file(model: Model, analysis: Analysis) -> Cost:
    """Parameters, MACs, bytes and nodes of the file that ``model`` was loaded from, as it lies on disk."""
    if analysis.reduction is not None:
        analysis.reduction.name_decision_sizes(model.graph)
    cost = cost_of(model.graph, infer_graph(model.graph, dict(analysis.dim_sizes)))
    return replace(cost, bytes=file_bytes(model.path), nodes=model.nodes)
