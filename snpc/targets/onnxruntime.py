"""onnxruntime: the graph as its own optimiser leaves it, saved; with fusions where they pay.

Each candidate must give what the model gives, and is timed in interleaved rounds against the plain optimised graph,
which is what a session of the model runs. That one stays unless another is faster beyond what the rounds scatter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.passes.canonicalization.finalize import clean
from snpc.passes.canonicalization.fold_shape_arithmetic import settle_sizes
from snpc.passes.fusion.fuse_attention import fuse_attention
from snpc.passes.fusion.fuse_gemm_bias import bias_in_products
from snpc.runtime.evaluation.bench import median_interval, run_rounds
from snpc.runtime.evaluation.compare import TOLERANCE, compare, outputs_of, pooled, worst
from snpc.runtime.execution.session import first_lines, open_session, prepare_run, run_session, save_optimised
from snpc.runtime.io.atomic import data_file
from snpc.runtime.io.load import file_bytes, load
from snpc.runtime.io.save import LIMIT, save
from snpc.targets.base import Job, Made, Request, Target
from snpc.types import Feeds, FloatArray

ROUNDS = 20
SECONDS = 3.0  # small models get more rounds
LOOK = 5  # rounds of a first look at all candidates
SLOW = 0.95  # times as fast as the plain graph: less is not looked at again
SAME = 10 * TOLERANCE[np.dtype(np.float32)]


Rewrite = Callable[[ir.Model], tuple[ir.Model, int]]  # a copy, and how often it fitted


@dataclass(frozen=True)
class Candidate:
    name: str
    path: Path


def make(job: Job) -> Made:
    if job.precision == "fp16" and job.provider == "cpu":
        return as_it_is(job)
    folder = job.source.parent
    plain = Candidate("as onnxruntime optimises it", folder / "plain.onnx")
    save_optimised(job.source, plain.path, provider=job.provider)
    reference = outputs_of(job.model, job.feeds, job.provider)
    allowed = SAME + 1.25 * apart(reference, plain.path, job)
    notes: list[str] = []
    good = [plain]
    for name, source in sources(job):
        found = Candidate(name, folder / f"candidate{len(good)}-{len(notes)}.onnx")
        try:
            save_optimised(source, found.path, provider=job.provider)
            gap = apart(reference, found.path, job)
        except Exception as error:  # a fusion that onnxruntime cannot run is no candidate
            notes.append(f"{name}: not used, {first_lines(error)}")
            continue
        if gap > allowed:
            notes.append(f"{name}: not used, outputs are {gap:.1e} away from the model's")
        else:
            good.append(found)
    best = fastest(job, good, notes) if len(good) > 1 else plain
    notes.append(f"written: {best.name}")
    return publish(job, best, notes)


def as_it_is(job: Job) -> Made:
    """fp16 for a provider without fp16 kernels: optimising would write the weights back in fp32."""
    head = job.output.with_suffix(".onnx")
    job.source.replace(head)
    note = "onnxruntime's CPU kernels compute in fp32: half the bytes, no speed; no .ort is written"
    return Made((head,), (note,))


def sources(job: Job) -> list[tuple[str, Path]]:
    """Models with nodes fused beyond what a session does by itself."""
    folder = job.source.parent
    plain = settle_sizes(load(job.source).graph)
    inside = fused("attention in one node", plain, fuse_attention)
    projected = fused("attention with its projections in one node", plain, partial(fuse_attention, projections=True))
    starts = [("", plain), *inside, *projected]
    biased = [
        one for name, made in starts for one in fused(joined(name, "biases inside products"), made, bias_in_products)
    ]
    found: list[tuple[str, Path]] = []
    for name, made in (*inside, *projected, *biased):
        path = folder / f"rewritten{len(found)}.onnx"
        save(clean(made), path)
        found.append((name, path))
    for index, (name, path) in enumerate([("", job.source), *found[: len(inside)]]):
        out = folder / f"transformers{index}.onnx"
        if file_bytes(path) < LIMIT and transformers_fusions(path, out, job.provider):
            found.append((joined(name, "onnxruntime.transformers' fusions"), out))
    return found


def fused(name: str, model: ir.Model, rewrite: Rewrite) -> list[tuple[str, ir.Model]]:
    """What ``rewrite`` makes of it, with how often it fits; nothing where it does not."""
    made, count = rewrite(model)
    return [(f"{name} ({count} times)", made)] if count else []


def joined(*names: str) -> str:
    return " and ".join(name for name in names if name)


def transformers_fusions(path: Path, out: Path, provider: str) -> bool:
    """Write what ``onnxruntime.transformers.optimizer`` makes of a model; False where it fuses nothing."""
    from onnxruntime.transformers import optimizer

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    for name in [n for n in logging.root.manager.loggerDict if n.startswith(("fusion_", "onnx_model"))]:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        made: Any = optimizer.optimize_model(str(path), "bert", opt_level=0, use_gpu=provider != "cpu")
    except Exception:  # it fails in many ways on graphs that it does not expect: then there is nothing to try
        return False
    if not any(made.get_fused_operator_statistics().values()):
        return False
    made.save_model_to_file(str(out))
    return True


def apart(reference: Sequence[Feeds], path: Path, job: Job) -> float:
    """How far the outputs of a session with all optimisations are from the model's."""
    session = open_session(path, provider=job.provider)
    found = [run_session(session, feeds, name=path.name) for feeds in job.feeds]
    return worst(pooled([compare(a, b) for a, b in zip(reference, found, strict=True)]))


def fastest(job: Job, candidates: Sequence[Candidate], notes: list[str]) -> Candidate:
    """The candidate that takes least processor time on one thread, which other load on the machine does not blur; of
    those that are not slower by the clock, on as many threads as onnxruntime takes. On a GPU the clock decides."""
    candidates = promising(job, candidates, notes)
    if len(candidates) == 1:
        return candidates[0]
    clock = ratios(job, candidates, time.perf_counter, 0)
    spent = ratios(job, candidates, time.process_time, 1) if job.provider == "cpu" else clock
    good = [candidates[0]]
    speeds = {candidates[0]: 1.0}
    for candidate in candidates[1:]:
        low, _ = median_interval(spent[candidate])
        _, high = median_interval(clock[candidate])
        speeds[candidate] = float(np.median(spent[candidate]))
        by_clock = float(np.median(clock[candidate]))
        notes.append(f"{candidate.name}: {speeds[candidate]:.2f}x in processor time, {by_clock:.2f}x by the clock")
        if low > 1.0 and high >= 1.0:
            good.append(candidate)
    return max(good, key=lambda candidate: speeds[candidate])


def promising(job: Job, candidates: Sequence[Candidate], notes: list[str]) -> list[Candidate]:
    """Those that a first look does not find clearly slower than the first."""
    clock = time.process_time if job.provider == "cpu" else time.perf_counter
    found = []
    for candidate, speeds in ratios(job, candidates, clock, 1, LOOK, 0.0).items():
        speed = float(np.median(speeds))
        if candidate is candidates[0] or speed >= SLOW:
            found.append(candidate)
        else:
            notes.append(f"{candidate.name}: {speed:.2f}x in processor time")
    return found


def ratios(
    job: Job,
    candidates: Sequence[Candidate],
    clock: Callable[[], float],
    threads: int,
    rounds: int = ROUNDS,
    seconds: float | None = None,
) -> dict[Candidate, FloatArray]:
    """Candidate -> [rounds], how many times as fast as the first it was in each round."""
    sessions = [open_session(c.path, provider=job.provider, threads=threads) for c in candidates]
    calls = [[prepare_run(session, job.timed)] for session in sessions]
    run_rounds(calls, iterations=2)
    times = run_rounds(calls, iterations=rounds, duration=SECONDS if seconds is None else seconds, clock=clock)
    return {candidate: times[:, 0] / times[:, k] for k, candidate in enumerate(candidates)}


def publish(job: Job, best: Candidate, notes: list[str]) -> Made:
    """The candidate as ONNX and in onnxruntime's own format, under the output's name."""
    head = job.output.with_suffix(".onnx")
    flat = job.output.with_suffix(".ort")
    big = file_bytes(best.path) > LIMIT
    save_optimised(best.path, head, provider=job.provider, external=data_file(head).name if big else "")
    files = [head, *([data_file(head)] if big else [])]
    if big:
        notes.append("no .ort: that format holds 2 GB at most")
    else:
        save_optimised(best.path, flat, provider=job.provider, form="ORT")
        open_session(flat, provider=job.provider)
        files.append(flat)
    wanted = flat if job.output.suffix == ".ort" and not big else head
    notes.append("optimised for this machine's processor: build it on the kind of machine that runs it")
    return Made((wanted, *(f for f in files if f != wanted)), tuple(notes))


def check(request: Request) -> None:
    if request.output.suffix not in (".onnx", ".ort"):
        raise UserError(f"{request.output}: --target ort writes .onnx and .ort; give one of these names with -o")
    if request.precision == "bf16" and request.provider == "cpu":
        raise UserError("--precision bf16: onnxruntime has no bfloat16 kernels for the CPU; take fp16 or int8")


TARGET = Target(
    "ort",
    "onnxruntime: its optimised graph, saved as .onnx and .ort, with attention fused where that is faster",
    ".onnx",
    make,
    ("fp32", "fp16", "bf16", "int8"),
    beside=(".onnx", ".onnx.data", ".ort"),
    check=check,
)
