"""Verification of written files: the sliced graph equals the masked one."""

from __future__ import annotations

from pathlib import Path

from snpc.errors import UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.passes.slicing.rewrite import Rewritten, rewrite_model
from snpc.pipeline.refit import Means, compression_for, fitted
from snpc.pipeline.token_decisions import check_tokens
from snpc.planning.plan import Plan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.compare import (
    CHECKED_BATCHES,
    check_structure,
    compare_models,
    judge,
    outputs_of,
    tolerance_of,
)
from snpc.runtime.execution.memory import too_large_to_run
from snpc.runtime.execution.random_inputs import random_inputs
from snpc.runtime.execution.session import NotLoaded
from snpc.runtime.io.load import load
from snpc.runtime.statistics.statistics import Statistics
from snpc.types import Feeds, Verdict


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
