"""Everything that the report shows, as one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis, analyze, macs_by_role
from snpc.pipeline import PrunedModel, PruningPlan
from snpc.planning import layers_of, pruning_of, target_text
from snpc.report.attention_maps import AttentionMaps, attention_maps
from snpc.report.comparison import ComparedFile, FileComparison
from snpc.report.format import describe_method
from snpc.report.history import history_text, step_text
from snpc.report.quality_text import (
    dequantization_text,
    quality_text,
    quality_warning,
    requantization_text,
    restriction_text,
    rewrite_text,
)
from snpc.report.reproduction import Reproduction, reproduction_of_file, reproduction_of_result
from snpc.report.token_maps import TokenMaps, token_maps
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import BenchResult
from snpc.runtime.io import file_bytes, load
from snpc.tokens import reduce_tokens
from snpc.types import Difference, FloatArray, Grade, Group, Pin, Quality, TaskChange


@dataclass(frozen=True)
class Measured:
    """A number of the original (``before``) and of each file (``after``; None: not known), with its name and unit."""

    name: str
    unit: str
    before: float
    after: tuple[float | None, ...]


@dataclass(frozen=True)
class GroupWidth:
    """One group of the original: ``blocks`` x ``size`` units, and ``blocks`` x ``kept`` in each file (None: not known).

    ``curve`` [size + 1], where measured: change of the outputs (relative RMS) by units kept per block, while all other
    groups keep theirs. ``form``: the closed form that made the weights, "" without one. ``normalized_inside``: a
    normalization takes statistics over its units, so that the cut is approximate.
    """

    id: str
    role: str
    layer: int
    blocks: int
    size: int
    kept: tuple[int | None, ...]
    form: str = ""
    curve: tuple[float, ...] = ()
    normalized_inside: bool = False


@dataclass(frozen=True)
class TokenCount:
    """So many tokens are ``left`` behind ``block``, of the original's ``tokens``; on average where their number depends
    on the input."""

    block: int
    tokens: float
    left: float


@dataclass(frozen=True)
class FileReport:
    """The statements on one file. ``made``: how it was made, by what it says itself or by what was asked for.
    ``steps``: the steps that made it, with their sources. ``rewrite``: whether it computes what the plan says, where
    that is known. ``removed``: layers that are gone."""

    name: str
    path: str
    made: str
    quality: str
    grade: Grade
    warning: str
    compared: str
    differences: tuple[Difference, ...]
    task: TaskChange | None = None
    removed: tuple[str, ...] = ()
    rewrite: str = ""
    equals_mask: tuple[Difference, ...] = ()
    structure: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    reproduction: Reproduction | None = None


@dataclass(frozen=True)
class ReportData:
    """What the page shows: one original, and one file or several.

    ``macs``: by role, each product counted once. ``tokens``: where tokens get fewer, of a file that was just pruned.
    ``options``, ``pins``, ``seconds``: of the run, where the page is written by one.
    """

    model: str
    digest: str
    files: tuple[FileReport, ...]
    costs: tuple[Measured, ...]
    widths: tuple[GroupWidth, ...]
    macs: tuple[Measured, ...]
    macs_at: Mapping[str, int]
    bench: BenchResult | None
    attention: AttentionMaps
    token_maps: TokenMaps
    tokens: tuple[TokenCount, ...] = ()
    warnings: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = ()
    options: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)


# -- a model that was just pruned ------------------------------------------------------------------------------------


def collect_report_data(
    result: PrunedModel,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    bench: BenchResult | None = None,
    command: str = "",
) -> ReportData:
    """Collect the data of the page. The written file is read once more for MACs by role, attention and token maps.
    ``command``: what was typed."""
    slices, analysis, verdict = result.plan, result.plan.analysis, result.verification
    removal = analysis.removal
    file = FileReport(
        name=result.path.name,
        path=str(result.path),
        made=describe_request(result),
        **statements(result.quality),
        task=result.task,
        removed=removal.descriptions if removal is not None else (),
        rewrite=rewrite_text(verdict),
        equals_mask=verdict.equals_mask,
        steps=tuple(map(step_text, result.provenance)),
        structure=(*((f"not run: {verdict.not_run}",) if verdict.not_run else ()), *verdict.structure),
        reproduction=reproduction_of_result(result, command),
    )
    costs = (
        Measured("MACs", "", result.before.macs, (result.after.macs,)),
        Measured("parameters", "", result.before.params, (result.after.params,)),
        Measured("size on disk", "B", result.before.bytes, (result.after.bytes,)),
    )
    return ReportData(
        model=str(analysis.model.source),
        digest=analysis.model.digest,
        files=(file,),
        costs=(*costs, *latencies(bench)),
        widths=group_widths(result, plan.loss_curves if plan else {}),
        macs=role_macs(without_reduction(analysis), [macs_by_role(analyze(load(result.path), analysis.dim_sizes))]),
        macs_at=dict(analysis.dim_sizes),
        bench=bench,
        attention=attention_maps(analysis, result.path, calibration, slices),
        token_maps=token_maps(analysis, result.path, calibration),
        tokens=token_counts(analysis),
        warnings=collect_warnings(result, plan),
        pins=analysis.pins,
        options=dict(slices.options),
        seconds=dict(result.seconds),
    )


def statements(quality: Quality) -> dict[str, Any]:
    """What is said of the outputs, as fields of ``FileReport``."""
    return {
        "quality": quality_text(quality),
        "grade": quality.grade,
        "warning": quality_warning(quality),
        "compared": quality.source,
        "differences": quality.differences,
    }


def describe_request(result: PrunedModel) -> str:
    """What was asked for and how it was done, in one line."""
    options = result.plan.options
    goal = target_text(options) or "by hand"
    reduction = result.plan.analysis.reduction
    if reduction is not None:
        goal = f"tokens {reduction.spec}" + (f"; {goal}" if options.get("roles") else "")
    spread = ", the same share of every group" if options.get("uniform") else ""
    roles = ", ".join(options.get("roles", ()))
    data = result.calibration or "no calibration data"
    return f"{goal}{f' in {roles}' if roles else ''}{spread}; {describe_method(result)}; {data}"


def latencies(bench: BenchResult | None) -> tuple[Measured, ...]:
    """``bench``: of the original and the files, in this order. The latency of a file is the original's median divided
    by the speed-up, which is measured in pairs."""
    if bench is None:
        return ()
    before = bench.timings[0].median
    return (Measured("latency", "ms", before, tuple(before / speedup.ratio for speedup in bench.speedups)),)


def group_widths(result: PrunedModel, curves: Mapping[str, FloatArray]) -> tuple[GroupWidth, ...]:
    """The groups of the roles that were cut."""
    plan = result.plan
    cut = {g.role for g in plan.analysis.groups if g.id in plan.keep} | set(plan.options.get("roles", ()))
    return tuple(
        GroupWidth(
            *identity(g),
            (plan.kept_width(g),),
            result.closed_forms.get(g.id, "") if g.id in plan.keep else "",
            tuple(np.sqrt(curves[g.id]).tolist()) if g.id in curves else (),
            g.normalized_inside,
        )
        for g in plan.analysis.groups
        if g.prunable and g.role in cut
    )


def identity(group: Group) -> tuple[str, str, int, int, int]:
    return group.id, group.role, group.layer, group.blocks, group.size


def without_reduction(analysis: Analysis) -> Analysis:
    return analysis if analysis.reduction is None else analyze(analysis.model, analysis.dim_sizes)


def role_macs(original: Analysis, files: Sequence[Mapping[str, int]]) -> tuple[Measured, ...]:
    """MACs by role, of the original and of each file; not known of a file without any."""
    before = macs_by_role(original)
    names = dict.fromkeys(name for macs in (before, *files) for name in macs)
    return tuple(
        Measured(name, "", before.get(name, 0), tuple(macs.get(name, 0) if macs else None for macs in files))
        for name in names
    )


def token_counts(analysis: Analysis) -> tuple[TokenCount, ...]:
    """Where tokens get fewer, and how many are left."""
    if analysis.reduction is None:
        return ()
    steps = analysis.reduction.to_json()["steps"]
    return tuple(TokenCount(step["block"], steps[0]["tokens"], step["after"]) for step in steps if "after" in step)


def collect_warnings(result: PrunedModel, plan: PruningPlan | None) -> tuple[str, ...]:
    """What a reader should know before trusting the numbers."""
    warnings = []
    restriction = result.plan.analysis.model.restriction
    if restriction is not None:
        warnings.append(f"Before and after have {restriction_text(restriction)}.")
    dequantization = result.plan.analysis.model.dequantization
    if dequantization is not None:
        warnings.append(f"Before and after are float models: {dequantization_text(dequantization)}.")
    if result.verification.requantization is not None:
        warnings.append(f"{requantization_text(result.verification.requantization).capitalize()}.")
    if not result.calibration:
        warnings.append("No calibration data: drift was measured on random inputs and may differ on real ones.")
    if not result.quality.differences:
        warnings.append("Outputs were not compared: the original cannot be run here.")
    closed_forms = plan.closed_forms if plan else None
    if closed_forms is not None and closed_forms.skipped:
        for reason, number in Counter(closed_forms.skipped.values()).items():
            warnings.append(f"{number} {plural('group', number)} selected and sliced without refitting: {reason}.")
    dead_macs = result.plan.analysis.dead_macs
    if dead_macs and result.plan.analysis.reduction is None:
        warnings.append(f"{dead_macs:,} MACs were removed with rows that no output depends on; that changes no output.")
    return tuple(warnings)


# -- files that were compared ----------------------------------------------------------------------------------------


def collect_comparison_data(comparison: FileComparison, *, bench: BenchResult | None = None) -> ReportData:
    """The same of files. Maps are of the first one."""
    analysis, files = comparison.analysis, comparison.files
    first, names = files[0], file_names(files)
    reduced = reduced_as(analysis, first)
    cost = analysis.cost
    costs = (
        Measured("MACs", "", cost.macs, tuple(file.macs for file in files)),
        Measured("parameters", "", cost.params, tuple(file.cost.params if file.cost else None for file in files)),
        Measured("size on disk", "B", file_bytes(analysis.model.path), tuple(file.bytes for file in files)),
    )
    return ReportData(
        model=str(analysis.model.source),
        digest=analysis.model.digest,
        files=tuple(file_report(name, file, analysis) for name, file in zip(names, files, strict=True)),
        costs=(*costs, *latencies(bench)),
        widths=compared_widths(analysis, files),
        macs=role_macs(analysis, [file.macs_by_role for file in files]),
        macs_at=dict(analysis.dim_sizes),
        bench=bench,
        attention=attention_maps(analysis, first.path, comparison.calibration),
        token_maps=token_maps(reduced, first.path, comparison.calibration),
        tokens=token_counts(reduced) if len(files) == 1 else (),
        warnings=comparison_warnings(comparison),
        pins=analysis.pins,
    )


def file_names(files: Sequence[ComparedFile]) -> list[str]:
    """Names of files, whole paths where two names are equal."""
    count = Counter(file.path.name for file in files)
    return [file.path.name if count[file.path.name] == 1 else str(file.path) for file in files]


def file_report(name: str, file: ComparedFile, analysis: Analysis) -> FileReport:
    steps = file.provenance
    return FileReport(
        name=name,
        path=str(file.path),
        made=history_text(steps) or "the file does not say how it was made",
        steps=tuple(map(step_text, steps)),
        **statements(file.quality),
        task=file.task,
        removed=tuple(name for step in steps for name in layers_of(step)),
        reproduction=reproduction_of_file(file.path, steps, analysis),
    )


def reduced_as(analysis: Analysis, file: ComparedFile) -> Analysis:
    """The analysis with fewer tokens, as the file says; unchanged where it says nothing, or of another original."""
    cut = pruning_of(file.provenance, analysis.model.digest)
    if cut is None or "tokens" not in cut:
        return analysis
    try:
        return reduce_tokens(analysis, cut["tokens"])
    except UserError:  # scores that were measured on data stand in the file, and not in its words
        return analysis


def compared_widths(analysis: Analysis, files: Sequence[ComparedFile]) -> tuple[GroupWidth, ...]:
    """The groups of the roles that are narrower in any file."""
    cut = {g.role for g in analysis.groups for file in files if file.kept.get(g.id, g.size) < g.size}
    return tuple(
        GroupWidth(*identity(g), tuple(file.kept.get(g.id) for file in files), normalized_inside=g.normalized_inside)
        for g in analysis.groups
        if g.prunable and g.role in cut
    )


def comparison_warnings(comparison: FileComparison) -> tuple[str, ...]:
    warnings = []
    if comparison.calibration is None:
        warnings.append("No data were given: drift was measured on random inputs and may differ on real ones.")
    digest = comparison.analysis.model.digest
    for file in comparison.files:
        name = file.path.name
        sources = [step.get("source_sha256") for step in file.provenance]
        if sources and digest not in sources:
            warnings.append(f"{name} says that it was made of another file than this original.")
        if file.cost is None:
            warnings.append(f"{name} is no ONNX file: its MACs and parameters are not read.")
        elif file.macs is None:
            warnings.append(f"{name} has nodes whose MACs are not counted: {', '.join(file.cost.not_counted)}.")
        if not file.kept:
            warnings.append(
                f"The widths of {name} cannot be told: it does not say them, and its constants have other names."
            )
    return tuple(warnings)


def plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def widths_by_role(items: Sequence[GroupWidth]) -> dict[str, list[GroupWidth]]:
    """The same widths by role, roles in order of appearance."""
    by_role: dict[str, list[GroupWidth]] = {}
    for item in items:
        by_role.setdefault(item.role, []).append(item)
    return by_role
