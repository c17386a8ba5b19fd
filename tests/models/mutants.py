"""The judge of damaged models (``mutations.py`` makes them): each is done, or refused in one line, and nothing else.

    python -m tests.models.mutants [--count 10000] [--first 0] [--processes 2]

runs all of them through ``snpc inspect`` and ``snpc prune``, in processes of their own with little memory, and lists
what is neither done nor refused in one line: tracebacks, hangs, files that are read or written outside the model's
folder, and written models that do not equal their masked original. tests/policy/test_mutants.py does the same with a
few hundred in one process.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from click.testing import CliRunner
from onnx import numpy_helper

from snpc.cli import main
from tests.models.mutations import SECRET, mutant

Array = npt.NDArray[Any]
Report = Mapping[str, Any]
LIMIT_SECONDS = 60
LIMIT_BYTES = 6 << 30  # of address space: Python, onnxruntime and its threads take one or two

SELECT = ("--method", "select", "--criterion", "magnitude")
MODES = (
    ("--ratio", "0.5", *SELECT),
    ("--ratio", "0.5", *SELECT, "--roles", "qk,vo,ffn,head,conv"),
    ("--ratio", "0.5", *SELECT, "--prune-kv-cache"),
    ("--ratio", "0", *SELECT),
    ("--ratio", "0.5", "--calib", "random", "--calib-samples", "4", "--calib-batch", "2"),
)
SIZES = ((2, 3), (3, 2), (5, 7), (1, 1), (2, 2), (4, 12))  # of the first dynamic axis, and of all others

OUTCOMES: Counter[tuple[str, int]] = Counter()
REASONS: Counter[tuple[str, str]] = Counter()
COMPARED: Counter[str] = Counter()

ort.set_default_logger_severity(4)


# -- the oracle ------------------------------------------------------------------------------------------------------


def masked_original(path: Path, report: Report) -> onnx.ModelProto | None:
    """The file with zeros where units were removed; None where a site is no initializer of the file's own."""
    model = onnx.load(str(path))
    weights = {t.name: t for t in model.graph.initializer}
    for group in report["groups"]:
        for site in group["sites"] if group["kept"] < group["size"] else ():
            tensor = weights.get(site["tensor"])
            if tensor is None:
                return None
            array = numpy_helper.to_array(tensor).copy()
            gone = np.ones(array.shape[site["axis"]], bool)
            gone[site["keep"]] = False
            array[(slice(None),) * site["axis"] + (gone,)] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def feeds_of(session: ort.InferenceSession, sizes: tuple[int, int]) -> dict[str, Array]:
    rng, feeds = np.random.default_rng(0), {}
    first: list[str] = []
    for value in session.get_inputs():
        names = [dim for dim in value.shape if not isinstance(dim, int)]
        first = first or names[:1]
        shape = [dim if isinstance(dim, int) else sizes[dim not in first] for dim in value.shape]
        if int(np.prod(shape, dtype=float)) > 1 << 22:
            raise ValueError("too large to run")
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "double", "float16"):
            feeds[value.name] = rng.standard_normal(shape).astype(
                {"float": "f4", "double": "f8", "float16": "f2"}[kind]
            )
        else:
            feeds[value.name] = rng.integers(0, 2, shape).astype("bool" if kind == "bool" else kind)
    return feeds


def open_session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def difference(expected: Sequence[Array], outputs: Sequence[Array]) -> float:
    """The largest, relative to the largest entry of its output; infinity where shapes or finite entries differ."""
    worst = 0.0
    for a, b in zip(expected, outputs, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.dtype.kind != "f":
            worst = max(worst, float((a != b).mean()) if a.size else 0.0)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        if (finite != np.isfinite(b)).any():
            return float("inf")
        a, b = a[finite], b[finite]
        if a.size:
            worst = max(worst, float(np.abs(a - b).max()) / max(float(np.abs(a).max()), 1e-30))
    return worst


def runs(model: bytes) -> Iterator[tuple[dict[str, Array], list[Array]]]:
    """(feeds, outputs) at each of the sizes that the model runs at."""
    session = open_session(model)
    for sizes in SIZES:
        try:
            feeds = feeds_of(session, sizes)
            yield feeds, list(session.run(None, feeds))
        except Exception:  # a size that the model does not take: onnxruntime's errors share no base
            continue


def unequal_to_masked(path: Path, written: Path, report: Report) -> str:
    """Where a written model does not say what its masked original says; "" where it does, or neither can be run."""
    try:
        masked = masked_original(path, report)
        whole = masked.SerializeToString() if masked is not None else b""
        expected = list(runs(whole)) if whole else []
    except Exception as error:  # the original does not load in onnx or onnxruntime
        COMPARED[f"not: {type(error).__name__}"] += 1
        return ""
    if not expected:
        COMPARED["not: no masked original that runs"] += 1
        return ""
    cut = open_session(onnx.load(str(written)).SerializeToString())
    half = b"float16" in str(masked).encode() or any(a.dtype == np.float16 for _, b in expected for a in b)
    for feeds, outputs in expected:
        again = list(cut.run(None, {i.name: feeds[i.name] for i in cut.get_inputs()}))
        gap = difference(outputs, again)
        if gap > (5e-2 if half else 2e-3):
            shapes = {name: a.shape for name, a in feeds.items()}
            return f"differs from its masked original by {gap:.1e} at {shapes}"
    COMPARED["equal to the masked original"] += 1
    return ""


# -- the judge -------------------------------------------------------------------------------------------------------


def trial(path: Path, mode: Sequence[str] = MODES[0]) -> list[str]:
    """What is wrong with how ``inspect`` and ``prune`` take a file: nothing, where they work or refuse it in a line.

    Refusals are exit code 2; a check that fails for the numbers of the model itself is 1. Either leaves no file.
    """
    complaints = []
    written, report = path.with_name("model-pruned.onnx"), path.with_name("report.json")
    for verb in ("inspect", "prune"):
        flags = [] if verb == "inspect" else [*mode, "--json", str(report)]
        before = {p: p.lstat().st_mtime_ns for p in path.parent.iterdir()}
        result = CliRunner().invoke(main, [verb, str(path), *flags])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            complaints.append(f"{verb}: {traceback_line(result.exception)}")
        lines = [line for line in result.stderr.splitlines() if not re.match("snpc: (note|warning|plan|next):", line)]
        refused = result.exit_code in (1, 2) and not complaints
        if refused and (len(lines) != 1 or not lines[0].startswith("snpc: ") or len(lines[0]) > 1000):
            complaints.append(f"{verb}: exit code {result.exit_code} in {len(lines)} lines: {lines[:3]}")
        if result.exit_code == 0 and lines:
            complaints.append(f"{verb}: done, but says {lines[:3]}")
        after = {p: p.lstat().st_mtime_ns for p in path.parent.iterdir()}
        new_files = {p.name for p in set(after) - set(before)}
        ours = {name for name in new_files if name.startswith(written.name) or name == report.name}
        if new_files - (ours if result.exit_code == 0 else set()):
            complaints.append(f"{verb}: exit code {result.exit_code} left {sorted(new_files)}")
        if any(after.get(p) != time for p, time in before.items()):
            complaints.append(f"{verb}: changed its input")
        OUTCOMES[verb, result.exit_code] += 1
        if result.exit_code:
            REASONS[verb, re.sub(r"[^ ]*/[^ ]*|\d+|'[^']*'", "_", (lines or [""])[0])[:110]] += 1
        elif verb == "prune":
            complaints += judged(path, written, report, result.stdout)
        for name in ours:
            (path.parent / name).unlink()
    return complaints


def judged(path: Path, written: Path, report: Path, said: str) -> list[str]:
    """What is wrong with a model that was written."""
    complaints = []
    if SECRET in written.read_bytes() and SECRET not in path.read_bytes():
        complaints.append("prune: a file outside the folder is in the output")
    found = json.loads(report.read_text())
    if found["verify"]["not_run"]:
        COMPARED["not run"] += 1
        if "not run: " not in said or "verified" in said:
            complaints.append("prune: nothing was compared, and that is not said")
    elif found["method"] == "select" and "approximate: " not in said:  # there the rest is normalized anew
        wrong = unequal_to_masked(path, written, found)
        complaints += [f"prune: {wrong}"] if wrong else []
    return complaints


def traceback_line(error: BaseException) -> str:
    trace = traceback.extract_tb(error.__traceback__)
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in trace if "/snpc/" in f.filename]
    return f"{type(error).__name__} at {(frames or [''])[-1]}: {str(error)[:200]!r}"


# -- all of them, in processes that may die --------------------------------------------------------------------------


def work(first: int, last: int, step: int) -> None:
    """One process's share; a line of JSON before and after each, so that the one that killed it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    outside: list[str] = []
    sys.addaudithook(lambda event, about: outside.append(str(about[0])) if is_outside(event, about) else None)
    with tempfile.TemporaryDirectory(prefix="snpc-mutants-") as name:
        for seed in range(first, last, step):
            folder = Path(name) / "inner" / str(seed)
            path, done = mutant(seed, folder)
            outside.clear()
            print(json.dumps({"seed": seed, "done": done}), flush=True)
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)  # the process ends with 1: a hang
            complaints = trial(path, MODES[seed % len(MODES)])
            faulthandler.cancel_dump_traceback_later()
            complaints += [f"opened {opened}" for opened in outside]
            counts = {"outcomes": list(OUTCOMES.items()), "reasons": list(REASONS.items())}
            print(
                json.dumps({"seed": seed, "complaints": complaints, **counts, "compared": list(COMPARED.items())}),
                flush=True,
            )
            for counter in (OUTCOMES, REASONS, COMPARED):
                counter.clear()
            shutil.rmtree(folder)


def is_outside(event: str, about: tuple[Any, ...]) -> bool:
    """Whether an audit event opens a file that models name and that is not theirs."""
    return event == "open" and isinstance(about[0], str) and about[0].endswith(("/secret", "/passwd"))


def share(first: int, last: int, step: int) -> tuple[list[str], list[Any]]:
    """Complaints of one share; a process that dies is reported and started again behind the file that killed it."""
    complaints: list[str] = []
    counts: list[Any] = []
    while first < last:
        words = [sys.executable, "-m", "tests.models.mutants", "--share", str(first), str(last), str(step)]
        with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stdout=-1, stderr=log, text=True) as child:
            assert child.stdout is not None
            now: dict[str, Any] = {"seed": first - step, "done": ""}
            for line in child.stdout:
                said = json.loads(line)
                if "outcomes" in said:
                    counts.append(said)
                if "done" in said:
                    now = said
                for words_ in said.get("complaints", ()):
                    complaints.append(f"{now['seed']} ({now['done']}) {words_}")
                    print(complaints[-1], flush=True)
            code = child.wait()
            if code == 0:
                break
            log.seek(0)
            complaints.append(f"{now['seed']} ({now['done']}) the process ended with {code}")
            print(complaints[-1], "\n".join(log.read().splitlines()[:25]), flush=True)
        first = int(now["seed"]) + step
    return complaints, counts


def run_all() -> None:
    from concurrent.futures import ThreadPoolExecutor

    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--share", type=int, nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.share:
        work(*given.share)
        return
    ends = given.first + given.count
    with ThreadPoolExecutor(given.processes) as pool:
        shares = list(pool.map(lambda k: share(given.first + k, ends, given.processes), range(given.processes)))
    complaints = list(itertools.chain(*(lines for lines, _ in shares)))
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for said in itertools.chain(*(counts for _, counts in shares)):
        for (verb, code), count in said["outcomes"]:
            outcomes[f"{verb} exit code {code}"] += count
        for what, count in said["compared"]:
            outcomes[what] += count
        for (verb, reason), count in said["reasons"]:
            reasons[f"{verb} {reason}"] += count
    for text, count in [*sorted(outcomes.items()), *reasons.most_common(60)]:
        print(f"{count:6d}  {text}")
    print(f"{len(complaints)} of {given.count} damaged models are neither done nor refused in a line")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    run_all()
