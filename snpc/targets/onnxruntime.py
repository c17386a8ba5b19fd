"""Build target onnxruntime: the graph after its own optimizations, with further fusions where they are faster.

The outputs of each candidate must equal those of the model. Candidates are timed in interleaved rounds against the
plain optimized graph, which is what a session of the model runs; a candidate replaces it only if it is faster beyond
the scatter of the rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import GraphPass, PassObserver, run_pass
from snpc.passes import FUSE_ATTENTION, FUSE_ATTENTION_PROJECTIONS, FUSE_GEMM_BIAS
from snpc.passes.canonicalization import FOLD_SHAPE_ARITHMETIC, finalize
from snpc.passes.fusion import FusionResult
from snpc.runtime.evaluation import TOLERANCE, batch_differences, max_relative, median_interval, run_batches, run_rounds
from snpc.runtime.execution import Execution, first_lines, open_session, prepare_run, run_session, save_optimized
from snpc.runtime.io import PROTOBUF_LIMIT, external_data_path, file_bytes, load, save
from snpc.targets.base import BuildJob, BuildOutput, BuildRequest, BuildTarget
from snpc.types import Feeds, FloatArray

TIMING_ROUNDS = 20
TIMING_SECONDS = 3.0  # small models run more rounds
SCREENING_ROUNDS = 5  # rounds in which all candidates are timed first
SCREENING_SPEEDUP = 0.95  # speed relative to the plain graph: slower candidates are dropped
OUTPUT_TOLERANCE = 10 * TOLERANCE[np.dtype(np.float32)]


@dataclass(frozen=True)
class GraphCandidate:
    name: str
    path: Path


def build_onnxruntime(job: BuildJob) -> BuildOutput:
    if job.precision == "fp16" and job.execution.on_cpu:
        return keep_unoptimized(job)
    folder = job.source.parent
    plain = GraphCandidate("as onnxruntime optimizes it", folder / "plain.onnx")
    save_optimized(job.source, plain.path, execution=job.execution)
    reference = run_batches(job.model, job.feeds, job.execution)
    allowed = OUTPUT_TOLERANCE + 1.25 * output_drift(reference, plain.path, job)
    notes: list[str] = []
    good = [plain]
    for name, source in fusion_candidates(job):
        candidate = GraphCandidate(name, folder / f"candidate{len(good)}-{len(notes)}.onnx")
        try:
            save_optimized(source, candidate.path, execution=job.execution)
            drift = output_drift(reference, candidate.path, job)
        except Exception as error:  # onnxruntime cannot run the fused graph
            notes.append(f"{name}: not used, {first_lines(error)}")
            continue
        if drift > allowed:
            notes.append(f"{name}: not used, outputs differ by {drift:.1e} from the model's")
        else:
            good.append(candidate)
    best = select_fastest(job, good, notes) if len(good) > 1 else plain
    notes.append(f"written: {best.name}")
    return write_artifact(job, best, notes)


def keep_unoptimized(job: BuildJob) -> BuildOutput:
    """fp16 for a provider without fp16 kernels: its optimizations would convert the weights back to fp32."""
    if job.output.suffix == ".ort":
        raise UserError(
            f"{job.output.name}: onnxruntime's CPU kernels compute in fp32, and .ort would hold fp32 weights; give a "
            "name that ends with .onnx"
        )
    job.source.replace(job.output)
    return BuildOutput((job.output,), ("onnxruntime's CPU kernels compute in fp32: half the bytes, no speed",))


def fusion_candidates(job: BuildJob) -> list[tuple[str, Path]]:
    """Models with fusions that a session does not do by itself, by name."""
    folder = job.source.parent
    observer = job.execution.observer
    plain = run_pass(FOLD_SHAPE_ARITHMETIC, load(job.source).graph, observer).model
    attention_fused = apply_fusion("attention in one node", plain, FUSE_ATTENTION, observer)
    projected = apply_fusion("attention with its projections in one node", plain, FUSE_ATTENTION_PROJECTIONS, observer)
    starts = [("", plain), *attention_fused, *projected]
    biased = [
        candidate
        for name, model in starts
        for candidate in apply_fusion(join_names(name, "biases inside products"), model, FUSE_GEMM_BIAS, observer)
    ]
    sources: list[tuple[str, Path]] = []
    for name, fused in (*attention_fused, *projected, *biased):
        path = folder / f"rewritten{len(sources)}.onnx"
        save(finalize(fused), path)
        sources.append((name, path))
    for index, (name, path) in enumerate([("", job.source), *sources[: len(attention_fused)]]):
        output = folder / f"transformers{index}.onnx"
        if file_bytes(path) < PROTOBUF_LIMIT and apply_transformers_fusions(path, output, job.execution):
            sources.append((join_names(name, "onnxruntime.transformers' fusions"), output))
    return sources


def apply_fusion(
    name: str, model: ir.Model, fusion: GraphPass, observer: PassObserver | None
) -> list[tuple[str, ir.Model]]:
    """The fused model, with the number of fused nodes in its name; nothing where there is nothing to fuse."""
    result = run_pass(fusion, model, observer)
    assert isinstance(result, FusionResult)
    return [(f"{name} ({result.count} times)", result.model)] if result.modified else []


def join_names(*names: str) -> str:
    return " and ".join(name for name in names if name)


def apply_transformers_fusions(path: Path, output: Path, execution: Execution) -> bool:
    """Write the model as ``onnxruntime.transformers.optimizer`` fuses it; False where it fuses nothing."""
    from onnxruntime.transformers import optimizer

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    for name in [n for n in logging.root.manager.loggerDict if n.startswith(("fusion_", "onnx_model"))]:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        optimized: Any = optimizer.optimize_model(str(path), "bert", opt_level=0, use_gpu=not execution.on_cpu)
    except Exception:  # it fails in many ways on graphs that it does not expect: no candidate
        return False
    if not any(optimized.get_fused_operator_statistics().values()):
        return False
    optimized.save_model_to_file(str(output))
    return True


def output_drift(reference: Sequence[Feeds], path: Path, job: BuildJob) -> float:
    """Largest relative difference of a session with all optimizations from ``reference``."""
    session = open_session(path, execution=job.execution, memory="lean")
    outputs = [run_session(session, feeds, name=path.name) for feeds in job.feeds]
    return max_relative(batch_differences(reference, outputs))


def select_fastest(job: BuildJob, candidates: Sequence[GraphCandidate], notes: list[str]) -> GraphCandidate:
    """The candidate with the least processor time on one thread, which other load on the machine does not change, among
    those that are not slower in wall time on the default number of threads. On a GPU wall time decides."""
    candidates = screen_candidates(job, candidates, notes)
    if len(candidates) == 1:
        return candidates[0]
    clock = time_ratios(job, candidates, time.perf_counter, None)
    spent = time_ratios(job, candidates, time.process_time, 1) if job.execution.on_cpu else clock
    good = [candidates[0]]
    speeds = {candidates[0]: 1.0}
    for candidate in candidates[1:]:
        low, _ = median_interval(spent[candidate])
        _, high = median_interval(clock[candidate])
        speeds[candidate] = float(np.median(spent[candidate]))
        by_clock = float(np.median(clock[candidate]))
        notes.append(f"{candidate.name}: {speeds[candidate]:.2f}x in processor time, {by_clock:.2f}x in wall time")
        if low > 1.0 and high >= 1.0:
            good.append(candidate)
    return max(good, key=lambda candidate: speeds[candidate])


def screen_candidates(job: BuildJob, candidates: Sequence[GraphCandidate], notes: list[str]) -> list[GraphCandidate]:
    """Candidates that are not clearly slower than the first one in a few rounds."""
    clock = time.process_time if job.execution.on_cpu else time.perf_counter
    kept = []
    for candidate, speeds in time_ratios(job, candidates, clock, 1, SCREENING_ROUNDS, 0.0).items():
        speed = float(np.median(speeds))
        if candidate is candidates[0] or speed >= SCREENING_SPEEDUP:
            kept.append(candidate)
        else:
            notes.append(f"{candidate.name}: {speed:.2f}x in processor time")
    return kept


def time_ratios(
    job: BuildJob,
    candidates: Sequence[GraphCandidate],
    clock: Callable[[], float],
    threads: int | None,
    rounds: int = TIMING_ROUNDS,
    seconds: float | None = None,
) -> dict[GraphCandidate, FloatArray]:
    """Candidate -> [rounds]: time of the first candidate divided by its own, per round."""
    sessions = [open_session(c.path, execution=replace(job.execution, threads=threads)) for c in candidates]
    calls = [[prepare_run(session, job.timing_feeds)] for session in sessions]
    run_rounds(calls, iterations=2)
    times = run_rounds(calls, iterations=rounds, duration=TIMING_SECONDS if seconds is None else seconds, clock=clock)
    return {candidate: times[:, 0] / times[:, k] for k, candidate in enumerate(candidates)}


def write_artifact(job: BuildJob, best: GraphCandidate, notes: list[str]) -> BuildOutput:
    """Write the candidate, as ONNX or in onnxruntime's own format: the output's suffix says which."""
    big, output = file_bytes(best.path) > PROTOBUF_LIMIT, job.output
    if output.suffix == ".ort":
        if big:
            raise UserError(f"{output.name}: that format holds 2 GB at most; give a name that ends with .onnx")
        save_optimized(best.path, output, execution=job.execution, file_format="ORT")
    else:
        external_name = external_data_path(output).name if big else ""
        save_optimized(best.path, output, execution=job.execution, external_name=external_name)
    open_session(output, execution=job.execution)
    notes.append("optimized for the processor of this machine: build on the kind of machine that will run it")
    return BuildOutput((output,), tuple(notes))


def check_onnxruntime(request: BuildRequest) -> None:
    if request.output.suffix not in (".onnx", ".ort"):
        raise UserError(f"{request.output}: --target ort writes .onnx or .ort; give such a name with -o")
    if request.precision == "bf16" and request.execution.on_cpu:
        raise UserError("--precision bf16: onnxruntime has no bfloat16 kernels for the CPU; take fp16 or int8")


ONNXRUNTIME_TARGET = BuildTarget(
    "ort",
    "onnxruntime: its optimized graph, saved as .onnx or .ort, with attention fused where that is faster",
    ".onnx",
    build_onnxruntime,
    ("fp32", "fp16", "bf16", "int8"),
    check_request=check_onnxruntime,
)
