"""The verbs: prune in one call, or plan, apply and verify in steps. The command line is a thin skin over these."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph.shapes import evaluate
from snpc.passes.analyze import Analysis, analyze, cost_of
from snpc.passes.canonicalization.finalize import clean
from snpc.passes.canonicalization.shared_constants import origin
from snpc.passes.grouping.traced import Traced
from snpc.passes.plan import Plan, cuts_of
from snpc.passes.slicing.rewrite import Rewritten, rewrite_model
from snpc.passes.slicing.slice import Cuts
from snpc.runtime.calibration import Calibration
from snpc.runtime.capacity import too_large_to_run
from snpc.runtime.compress import compression_for
from snpc.runtime.evaluation.compare import (
    CHECKED_BATCHES,
    check_structure,
    compare_models,
    judge,
    outputs_of,
    tolerance_of,
)
from snpc.runtime.fit import Compression, fit, settled
from snpc.runtime.io.atomic import check_target, data_file, discard, publish, replacing
from snpc.runtime.io.load import file_bytes, load, model_files
from snpc.runtime.io.save import save
from snpc.runtime.noise import random_inputs
from snpc.runtime.norms import approximated, fit_norms, without
from snpc.runtime.sequential import fit_sequentially
from snpc.runtime.session import NotLoaded
from snpc.runtime.stages import NotSequential
from snpc.runtime.statistics import Statistics
from snpc.runtime.tokens import check_tokens, told
from snpc.types import Cost, Feeds, Verdict


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


@dataclass(frozen=True)
class Means:
    """What plans are carried out with. ``memory_limit``: see ``sequential.fit_sequentially``."""

    compression: Compression | None = None
    calibration: Calibration | None = None
    memory_limit: int | None = None
    provider: str = "cpu"

    def described(self) -> str:
        """The data, in words."""
        if self.calibration is not None:
            return self.calibration.described()
        return self.compression.source if self.compression is not None else ""


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


def fitted(plan: Plan, means: Means) -> tuple[Plan, Traced]:
    """The plan with its rotated groups in order, and the model at its full size with every weight made for it."""
    if plan.method == "select":
        return plan, plan.analysis.traced
    normed = approximated(plan)
    compression, calibration = means.compression, means.calibration
    if compression is None or (calibration is None and (plan.method == "auto" or normed)):
        raise UserError(
            f"this plan refits weights (method {plan.method}): it needs the calibration data that it was made with"
        )
    calibration = told(plan.analysis, calibration, means.provider)
    means = replace(means, calibration=calibration)
    plan = settled(compression, plan)
    rest = without(plan, normed)
    source = plan.analysis.traced
    if rest.keep:
        source = fitted_weights(compression, rest, means)
    if not normed:
        return plan, source
    assert calibration is not None
    return plan, fit_norms(source, plan, calibration, provider=means.provider)


def fitted_weights(compression: Compression, plan: Plan, means: Means) -> Traced:
    if plan.method == "auto" and means.calibration is not None and not plan.analysis.traced.kv_cache:
        try:
            return fit_sequentially(compression, plan, means.calibration, means.provider, means.memory_limit)
        except NotSequential:
            pass  # what the dense model gives serves as well
    return fit(compression, plan)


def written_cost(path: Path, analysis: Analysis) -> Cost:
    """Parameters, MACs, bytes and nodes of the file as it lies on disk."""
    model = load(path)
    if analysis.reduction is not None:
        analysis.reduction.mark(model.graph)
    cost = cost_of(model.graph, evaluate(model.graph, dict(analysis.binding)))
    return Cost(cost.params, cost.macs, file_bytes(path), cost.nodes)


def check_batches(analysis: Analysis, calibration: Calibration | None) -> tuple[list[Feeds], str]:
    """Feeds for verification: the first calibration batches, or seeded random inputs."""
    if calibration is not None:
        found: list[Feeds] = []
        for feeds in calibration.batches():
            found.append(feeds)
            if len(found) == CHECKED_BATCHES:
                break
        samples = sum(len(next(iter(f.values()))) for f in found)
        return found, f"{samples} samples of {calibration.source}"
    return [random_inputs(analysis, 2)], "random inputs"


def verify_written(
    rewritten: Rewritten, plan: Plan, path: Path, calibration: Calibration | None, provider: str
) -> Verdict:
    analysis = plan.analysis
    structure = check_structure(analysis.model.path, path, rewritten.interface())
    tolerance = tolerance_of(analysis.model)
    large = too_large_to_run(analysis.model) if provider == "cpu" else ""
    if large:
        said = f"outputs were not compared: {large}; compare them on a larger machine with `snpc verify`"
        return Verdict((*structure, said), (), (), "nothing", tolerance)
    batches, compared = check_batches(analysis, calibration)
    fed: list[Feeds] = batches
    try:
        dense = outputs_of(analysis.model.path, batches, provider)
    except NotLoaded as error:  # an operator that this onnxruntime does not have, say: nothing can be run
        unrun = "the original cannot be run here, so outputs were not compared"
        return Verdict((*structure, f"{unrun} ({error})"), (), (), "nothing", tolerance)
    except UserError as error:  # it loads: then nothing is written that was not compared
        advice = "" if calibration is not None else "; give --calib DATA that it runs on"
        raise UserError(f"the original does not run, so nothing can be verified: {error}{advice}") from None
    if analysis.reduction is not None:
        fed, said = check_tokens(analysis, path, batches, tolerance, provider)
        structure = (*structure, said)
    same, moved = compare_models(dense, path, rewritten, batches, provider, fed)
    return Verdict(structure, same, moved, compared, tolerance)


def verify(
    original: Path,
    pruned: Path,
    *,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    provider: str = "cpu",
) -> Verdict:
    """Check a pruned file against its original: structure, drift, and sliced-equals-masked where the plan is known.

    For a plan that refits weights (method auto or parallel) the last needs the data that it was made with.
    """
    analysis = plan.analysis if plan is not None else analyze(load(original))
    load(pruned)
    batches, compared = check_batches(analysis, calibration)
    rewritten = None
    fed: list[Feeds] = batches
    tokens: tuple[str, ...] = ()
    if plan is not None:
        if analysis.reduction is not None:
            fed, said = check_tokens(analysis, pruned, batches, tolerance_of(analysis.model), provider)
            tokens = (said,)
        compression = compression_for(plan, calibration, statistics=statistics, provider=provider)
        plan, source = fitted(plan, Means(compression, calibration, provider=provider))
        rewritten = rewrite_model(source, cuts_of(plan))
    structure = check_structure(original, pruned, rewritten.interface() if rewritten is not None else None)
    same, moved = compare_models(outputs_of(original, batches, provider), pruned, rewritten, batches, provider, fed)
    verdict = Verdict((*structure, *tokens), same, moved, compared, tolerance_of(analysis.model))
    judge(verdict)
    return verdict


# -- the JSON report: an interface -----------------------------------------------------------------------------------


def report(result: Pruned) -> dict[str, Any]:
    """What ``--json`` writes. ``keep`` are indices into the original initializer."""
    plan = result.plan
    both = {
        key: {"before": getattr(result.before, key), "after": getattr(result.after, key)}
        for key in ("params", "macs", "bytes", "nodes")
    }
    return {
        "snpc_report": 1,
        "model": str(plan.analysis.model.path),
        "output": str(result.path),
        "digest": plan.analysis.model.digest,
        "method": plan.method,
        "criterion": plan.criterion,
        "options": dict(plan.options),
        "calibration": result.calibration or None,
        "search": asdict(result.search) if result.search else None,
        **both,
        "macs_at": dict(plan.analysis.binding),
        "tokens": plan.analysis.reduction.to_json() if plan.analysis.reduction is not None else None,
        "groups": groups_json(plan, result.forms),
        "pins": pins_json(plan.analysis),
        "verify": verdict_json(result.verdict),
        "seconds": {k: round(v, 4) for k, v in result.seconds.items()},
    }


def groups_json(plan: Plan, forms: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Groups with their sites. A rotated group has no ``keep``: its units are new ones, ``kept`` per block."""
    forms = forms or {}
    graph = plan.analysis.traced.model.graph
    cuts = cuts_in_file(cuts_of(plan), graph)
    found = []
    for group in plan.analysis.groups:
        if group.pins:
            continue
        sites = []
        for site in group.sites:
            tensor = origin(graph.initializers[site.tensor])
            gone = cuts.get((tensor, site.axis))
            if gone is not None:
                place = {"tensor": tensor, "axis": site.axis}
                rotated = forms.get(group.id) in ("scores", "values")
                sites.append(place if rotated else {**place, "keep": np.flatnonzero(~gone).tolist()})
        found.append(
            {
                "id": group.id,
                "role": group.role,
                "blocks": group.blocks,
                "size": group.size,
                "kept": plan.kept(group),
                "freedom": group.freedom,
                "form": forms.get(group.id),
                "sites": sites,
            }
        )
    return found


def cuts_in_file(cuts: Cuts, graph: ir.Graph) -> Cuts:
    """Cuts by the names that constants have in the user's file. Of one that several users share (it is a copy per user
    here), what every user loses is gone."""
    copies: dict[str, list[str]] = {}
    for name, value in graph.initializers.items():
        copies.setdefault(origin(value), []).append(str(name))
    found = {}
    for (tensor, axis), gone in cuts.items():
        name = origin(graph.initializers[tensor])
        nothing = np.zeros_like(gone)
        found[name, axis] = np.logical_and.reduce([cuts.get((copy, axis), nothing) for copy in copies[name]])
    return found


def pins_json(analysis: Analysis) -> list[dict[str, Any]]:
    return [asdict(pin) for pin in analysis.pins]


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    pair = "sliced against masked" if verdict.equals_mask else "pruned against original"
    return {
        "max_abs_diff": verdict.max_abs_diff,
        "compared": f"{pair} on {verdict.compared}",
        "tolerance": verdict.tolerance,
        "structure": list(verdict.structure),
        "equals_mask": [asdict(d) for d in verdict.equals_mask],
        "drift": [asdict(d) for d in verdict.drift],
    }


def write_json(data: Any, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
