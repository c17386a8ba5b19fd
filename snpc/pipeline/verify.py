"""Verification of written files: the sliced graph equals the masked one."""

from __future__ import annotations

from pathlib import Path

from snpc.errors import UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.passes.slicing.rewrite import RewrittenModel, rewrite_model
from snpc.pipeline.refit import FitInputs, closed_forms_for, with_refitted_weights
from snpc.pipeline.token_decisions import check_token_reduction
from snpc.planning.plan import SlicePlan, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation.compare import (
    VERIFICATION_BATCHES,
    check_structure,
    compare_models,
    raise_if_unequal,
    rounding_tolerance,
    run_batches,
)
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.memory import too_large_reason
from snpc.runtime.execution.random_inputs import random_batch
from snpc.runtime.execution.session import SessionLoadError
from snpc.runtime.io.load import load
from snpc.runtime.statistics.statistics import Statistics
from snpc.types import Feeds, Verdict


def verification_batches(analysis: Analysis, calibration: Calibration | None) -> tuple[list[Feeds], str]:
    """Feeds for verification: the first calibration batches, or seeded random inputs."""
    if calibration is not None:
        found: list[Feeds] = []
        for feeds in calibration.batches():
            found.append(feeds)
            if len(found) == VERIFICATION_BATCHES:
                break
        samples = sum(len(next(iter(f.values()))) for f in found)
        return found, f"{samples} samples of {calibration.source}"
    return [random_batch(analysis, 2)], "random inputs"


def verify_candidate(
    rewritten: RewrittenModel,
    plan: SlicePlan,
    path: Path,
    calibration: Calibration | None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Verdict:
    analysis = plan.analysis
    structure = check_structure(analysis.model.path, path, rewritten.sliced_interface())
    tolerance = rounding_tolerance(analysis.model)
    large = too_large_reason(analysis.model) if execution.on_cpu else ""
    if large:
        said = f"outputs were not compared: {large}; compare them on a larger machine with `snpc verify`"
        return Verdict((*structure, said), (), (), "nothing", tolerance)
    batches, compared = verification_batches(analysis, calibration)
    fed: list[Feeds] = batches
    try:
        dense = run_batches(analysis.model.path, batches, execution)
    except SessionLoadError as error:  # an operator that this onnxruntime does not have, say: nothing can be run
        unrun = "the original cannot be run here, so outputs were not compared"
        return Verdict((*structure, f"{unrun} ({error})"), (), (), "nothing", tolerance)
    except UserError as error:  # it loads: then nothing is written that was not compared
        advice = "" if calibration is not None else "; give --calib DATA that it runs on"
        raise UserError(f"the original does not run, so nothing can be verified: {error}{advice}") from None
    if analysis.reduction is not None:
        fed, said = check_token_reduction(analysis, path, batches, tolerance, execution)
        structure = (*structure, said)
    same, moved = compare_models(dense, path, rewritten, batches, execution, fed)
    return Verdict(structure, same, moved, compared, tolerance)


def verify(
    original: Path,
    pruned: Path,
    *,
    plan: SlicePlan | None = None,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Verdict:
    """Check a pruned file against its original: structure, drift, and sliced-equals-masked where the plan is known.

    For a plan that refits weights (method auto or parallel) the last needs the data that it was made with.
    """
    analysis = plan.analysis if plan is not None else analyze(load(original))
    load(pruned)
    batches, compared = verification_batches(analysis, calibration)
    rewritten = None
    fed: list[Feeds] = batches
    tokens: tuple[str, ...] = ()
    if plan is not None:
        if analysis.reduction is not None:
            fed, said = check_token_reduction(analysis, pruned, batches, rounding_tolerance(analysis.model), execution)
            tokens = (said,)
        compression = closed_forms_for(plan, calibration, statistics=statistics, execution=execution)
        plan, source = with_refitted_weights(plan, FitInputs(compression, calibration, execution=execution))
        rewritten = rewrite_model(source, cuts_of(plan))
    structure = check_structure(original, pruned, rewritten.sliced_interface() if rewritten is not None else None)
    same, moved = compare_models(run_batches(original, batches, execution), pruned, rewritten, batches, execution, fed)
    verdict = Verdict((*structure, *tokens), same, moved, compared, rounding_tolerance(analysis.model))
    raise_if_unequal(verdict)
    return verdict
