"""Companions as files beside a candidate, verified alone and together with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snpc.passes import Analysis, Companion
from snpc.passes.canonicalization import finalize
from snpc.passes.slicing import RewrittenModel
from snpc.pipeline.companions.cut import FittedPlan
from snpc.pipeline.companions.merge import write_merged
from snpc.pipeline.verify import (
    DecoderPair,
    check_cached_decoding,
    compare_with_reference,
    declared_interface,
    run_original,
    verification_data,
)
from snpc.runtime.evaluation import check_structure
from snpc.runtime.execution import Execution
from snpc.runtime.io import load, save
from snpc.types import Model, TensorSpec


@dataclass(frozen=True)
class WrittenCompanion:
    """A companion that was cut and verified: its file, the original, the ``inputs`` of the file, and what ``holds`` of
    it, in words."""

    path: Path
    original: Model
    inputs: tuple[TensorSpec, ...]
    holds: str


def write_companions(fitted: FittedPlan, written: Path, execution: Execution) -> tuple[WrittenCompanion, ...]:
    """Cut the companions of the model that ``written`` was made from, and write them beside it under their own names.

    Raises CheckFailed where a companion is not what its masked graph is, or does not decode with the model.
    """
    return tuple(write_companion(fitted, companion, written, execution) for companion in fitted.analysis.companions)


def write_companion(fitted: FittedPlan, companion: Companion, written: Path, execution: Execution) -> WrittenCompanion:
    model, own, path = companion.analysis.model, fitted.of_companion(companion), written.parent / companion.name
    if model.merged is not None:
        return write_merged_companion(own, path, execution)
    rewritten, graph = own.rewrite()
    finalize(graph, execution.observer)
    own.sign(graph)
    save(graph, path, model.external)
    pruned = load(path)
    checks = (
        masked_check(companion.analysis, path, rewritten, execution),
        *check_cached_decoding(
            DecoderPair(fitted.analysis.model, model), DecoderPair(load(written), pruned), execution
        ),
    )
    return WrittenCompanion(path, model, pruned.inputs, f"{companion.name}: {', '.join(checks)}")


def write_merged_companion(fitted: FittedPlan, path: Path, execution: Execution) -> WrittenCompanion:
    """Write a companion that is a merged decoder itself: both branches, which become one file."""
    model, first = fitted.analysis.model, path.parent / f"{path.stem}_branches" / path.name
    first.parent.mkdir()
    rewritten, graph = fitted.rewrite()
    finalize(graph, execution.observer)
    fitted.sign(graph)
    save(graph, first, model.external)
    check = masked_check(fitted.analysis, first, rewritten, execution)
    (second, *_) = write_companions(fitted, first, execution)
    holds = write_merged(model, (first, second.path), path, execution)
    return WrittenCompanion(path, model, second.inputs, f"{holds}, {check}, {second.holds}")


def masked_check(analysis: Analysis, path: Path, rewritten: RewrittenModel, execution: Execution) -> str:
    """What holds of a companion alone, in words. Raises CheckFailed."""
    structure = check_structure(analysis.model.path, path, rewritten.sliced_interface(), declared_interface(analysis))
    data = verification_data(analysis, None, execution=execution)
    reference = run_original(analysis, analysis.model.path, data, execution)
    verdict = compare_with_reference(analysis, path, rewritten, reference, structure, execution)
    return f"sliced equals masked to {verdict.max_abs_diff:.1e}"
