"""Everything that the report shows, as one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from snpc.passes import analyze, macs_by_role
from snpc.pipeline import PrunedModel, PruningPlan
from snpc.planning import target_text
from snpc.report.attention_maps import AttentionMaps, attention_maps
from snpc.report.format import describe_method
from snpc.report.quality_text import (
    dequantization_text,
    quality_text,
    quality_warning,
    requantization_text,
    restriction_text,
    rewrite_text,
    task_text,
)
from snpc.report.token_maps import TokenMaps, token_maps
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import BenchResult
from snpc.runtime.io import load
from snpc.types import Difference, FloatArray, Grade, Pin


@dataclass(frozen=True)
class BeforeAfter:
    """A number before and after pruning, with its name and unit."""

    name: str
    unit: str
    before: float
    after: float


@dataclass(frozen=True)
class GroupWidth:
    """One group of the plan: ``blocks`` x ``size`` units before, ``blocks`` x ``kept`` after.

    ``curve`` [size + 1], where measured: change of the outputs (relative RMS) by units kept per block, while all other
    groups keep theirs. ``form``: the closed form that made the weights, "" without one. ``normalized_inside``: a
    normalization takes statistics over its units, so that the cut is approximate.
    """

    id: str
    role: str
    layer: int
    blocks: int
    size: int
    kept: int
    form: str
    curve: tuple[float, ...]
    normalized_inside: bool


@dataclass(frozen=True)
class ReportData:
    """What the page shows.

    ``request``: what was asked for and how it was done. ``macs``: by role, each product counted once. ``rewrite``,
    ``quality``, ``warning``, ``task``: the statements on the result. ``drift``, ``equals_mask``: what verification
    measured.
    """

    model: str
    output: str
    digest: str
    request: str
    options: Mapping[str, Any]
    costs: tuple[BeforeAfter, ...]
    widths: tuple[GroupWidth, ...]
    macs: tuple[BeforeAfter, ...]
    macs_at: Mapping[str, int]
    rewrite: str
    quality: str
    grade: Grade
    warning: str
    task: str
    compared: str
    drift: tuple[Difference, ...]
    equals_mask: tuple[Difference, ...]
    structure: tuple[str, ...]
    attention: AttentionMaps
    token_maps: TokenMaps
    warnings: tuple[str, ...]
    pins: tuple[Pin, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)


def collect_report_data(
    result: PrunedModel,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    bench: BenchResult | None = None,
) -> ReportData:
    """Collect the data of the page. The written file is read once more for MACs by role, attention and token maps."""
    slices, analysis, verdict = result.plan, result.plan.analysis, result.verification
    attention = attention_maps(result, calibration)
    return ReportData(
        model=str(analysis.model.source),
        output=str(result.path),
        digest=analysis.model.digest,
        request=describe_request(result),
        options=dict(slices.options),
        costs=(*cost_pairs(result), *latency_pairs(bench)),
        widths=group_widths(result, plan.loss_curves if plan else {}),
        macs=mac_pairs(result),
        macs_at=dict(analysis.dim_sizes),
        rewrite=rewrite_text(verdict),
        quality=quality_text(result.quality),
        grade=result.quality.grade,
        warning=quality_warning(result.quality),
        task=task_text(result.task) if result.task is not None else "",
        compared=result.quality.source,
        drift=result.quality.differences,
        equals_mask=verdict.equals_mask,
        structure=(*((f"not run: {verdict.not_run}",) if verdict.not_run else ()), *verdict.structure),
        attention=attention,
        token_maps=token_maps(result, calibration),
        warnings=collect_warnings(result, plan),
        pins=analysis.pins,
        seconds=dict(result.seconds),
    )


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


def cost_pairs(result: PrunedModel) -> tuple[BeforeAfter, ...]:
    """Costs read from both files."""
    before, after = result.before, result.after
    return (
        BeforeAfter("parameters", "", before.params, after.params),
        BeforeAfter("MACs", "", before.macs, after.macs),
        BeforeAfter("size on disk", "B", before.bytes, after.bytes),
    )


def latency_pairs(bench: BenchResult | None) -> tuple[BeforeAfter, ...]:
    """``bench``: of the original and the pruned model, in this order."""
    if bench is None:
        return ()
    before, after = bench.timings[0], bench.timings[1]
    return (BeforeAfter("latency", "ms", before.median, after.median),)


def group_widths(result: PrunedModel, curves: Mapping[str, FloatArray]) -> tuple[GroupWidth, ...]:
    """The groups of the roles that were cut."""
    plan = result.plan
    cut = {g.role for g in plan.analysis.groups if g.id in plan.keep} | set(plan.options.get("roles", ()))
    return tuple(
        GroupWidth(
            g.id,
            g.role,
            g.layer,
            g.blocks,
            g.size,
            plan.kept_width(g),
            result.closed_forms.get(g.id, "") if g.id in plan.keep else "",
            tuple(np.sqrt(curves[g.id]).tolist()) if g.id in curves else (),
            g.normalized_inside,
        )
        for g in plan.analysis.groups
        if g.prunable and g.role in cut
    )


def mac_pairs(result: PrunedModel) -> tuple[BeforeAfter, ...]:
    """MACs by role, of the original and of the written file."""
    analysis = result.plan.analysis
    before = macs_by_role(analysis if analysis.reduction is None else analyze(analysis.model, analysis.dim_sizes))
    after = macs_by_role(analyze(load(result.path), analysis.dim_sizes))
    return tuple(
        BeforeAfter(name, "", before.get(name, 0), after.get(name, 0)) for name in dict.fromkeys((*before, *after))
    )


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


def plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def widths_by_role(items: Sequence[GroupWidth]) -> dict[str, list[GroupWidth]]:
    """The same widths by role, roles in order of appearance."""
    by_role: dict[str, list[GroupWidth]] = {}
    for item in items:
        by_role.setdefault(item.role, []).append(item)
    return by_role
