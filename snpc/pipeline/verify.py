"""Verification of written files: the sliced graph equals the masked one, and the drift against the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snpc.errors import UserError
from snpc.passes import Analysis, analyze
from snpc.passes.slicing import RewrittenModel, rewrite_model
from snpc.pipeline.planner import PruningPlan
from snpc.pipeline.refit import with_refitted_weights
from snpc.pipeline.token_decisions import check_token_reduction
from snpc.planning import cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import (
    VERIFICATION_BATCHES,
    OutputMetrics,
    check_structure,
    compare_models,
    raise_if_unequal,
    rounding_tolerance,
    run_batches,
)
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, SessionLoadError, random_batch, too_large_reason
from snpc.runtime.io import load
from snpc.types import AnyArray, Feeds, Quality, Verdict

NOT_COMPARED = Quality((), 0, False, "nothing", False)


@dataclass(frozen=True)
class Reference:
    """The dense model's ``outputs`` for each of ``batches``, and how they are judged. ``source``: the inputs in
    words."""

    batches: Sequence[Feeds]
    outputs: Sequence[Mapping[str, AnyArray]]
    source: str
    random_inputs: bool
    metrics: OutputMetrics


def verification_batches(analysis: Analysis, calibration: Calibration | None) -> tuple[list[Feeds], str]:
    """Feeds for verification: the first calibration batches, or seeded random inputs."""
    if calibration is None:
        return [random_batch(analysis, 2)], "random inputs"
    batches: list[Feeds] = []
    for feeds in calibration.batches():
        batches.append(feeds)
        if len(batches) == VERIFICATION_BATCHES:
            break
    samples = sum(len(next(iter(feeds.values()))) for feeds in batches)
    return batches, f"{samples} samples of {calibration.source}"


def run_original(
    analysis: Analysis, original: Path, calibration: Calibration | None, execution: Execution
) -> Reference:
    batches, source = verification_batches(analysis, calibration)
    outputs = run_batches(original, batches, execution)
    return Reference(batches, outputs, source, calibration is None, OutputMetrics.of(analysis))


def compare_with_reference(
    analysis: Analysis,
    pruned: Path,
    rewritten: RewrittenModel | None,
    reference: Reference,
    structure: tuple[str, ...],
    execution: Execution,
) -> Verdict:
    """Run the pruned file and, where ``rewritten`` is known, the masked graph.

    Raises CheckFailed where they differ by more than rounding, or fewer tokens from the same tokens taken out in place.
    """
    tolerance, batches = rounding_tolerance(analysis.model), list(reference.batches)
    decided: list[Feeds] = batches
    if analysis.reduction is not None:
        decided, check = check_token_reduction(analysis, pruned, batches, tolerance, execution)
        structure = (*structure, check)
    equals_mask, drift = compare_models(
        reference.outputs, pruned, rewritten, batches, execution, decided, reference.metrics
    )
    samples = sum(len(next(iter(feeds.values()))) for feeds in batches)
    quality = Quality(drift, samples, False, reference.source, reference.random_inputs)
    verdict = Verdict(structure, equals_mask, quality, reference.source, tolerance)
    raise_if_unequal(verdict)
    return verdict


def verify_candidate(
    analysis: Analysis,
    path: Path,
    rewritten: RewrittenModel,
    calibration: Calibration | None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Verdict:
    """Verify a file that was just written.

    Outputs are compared, unless the dense model is too large for this machine or has an operator that this onnxruntime
    does not have: the verdict then says that nothing was run. Raises UserError where onnxruntime refuses the dense
    model for any other reason.
    """
    original = analysis.model.path
    structure = check_structure(original, path, rewritten.sliced_interface())
    tolerance = rounding_tolerance(analysis.model)
    too_large = too_large_reason(analysis.model) if execution.on_cpu else ""
    if too_large:
        return not_run_verdict(structure, too_large, tolerance)
    try:
        reference = run_original(analysis, original, calibration, execution)
    except SessionLoadError as error:
        if error.missing_operator:
            return not_run_verdict(structure, str(error), tolerance)
        raise UserError(f"nothing can be verified, so nothing is written: {error}; run onnx.checker on it") from None
    except UserError as error:  # it loads: then nothing is written that was not compared
        advice = "" if calibration is not None else "; give --calib DATA that it runs on"
        raise UserError(f"the original does not run, so nothing can be verified: {error}{advice}") from None
    return compare_with_reference(analysis, path, rewritten, reference, structure, execution)


def not_run_verdict(structure: tuple[str, ...], reason: str, tolerance: float) -> Verdict:
    """The verdict on a file whose outputs cannot be compared here."""
    advice = "outputs were not compared; compare them with `snpc verify` where the model runs"
    return Verdict(structure, (), NOT_COMPARED, "nothing", tolerance, f"{reason}; {advice}")


def verify(
    original: Path,
    pruned: Path,
    *,
    plan: PruningPlan | None = None,
    calibration: Calibration | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Verdict:
    """Check a pruned file against its original: structure, drift, and sliced equals masked where the plan is known.

    ``calibration``: inputs to run on; None: those of the plan, or random ones. A plan that refits weights must have
    its closed forms (``complete_plan``). Raises CheckFailed where a check fails.
    """
    analysis = plan.analysis if plan is not None else analyze(load(original))
    load(pruned)
    rewritten = None
    if plan is not None:
        calibration = calibration or plan.calibration
        slices, source = with_refitted_weights(plan)
        rewritten = rewrite_model(source, cuts_of(slices))
    structure = check_structure(original, pruned, rewritten.sliced_interface() if rewritten is not None else None)
    reference = run_original(analysis, original, calibration, execution)
    return compare_with_reference(analysis, pruned, rewritten, reference, structure, execution)
