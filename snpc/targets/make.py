"""model -> artefact: at the wanted precision, by a target, loaded again, compared, and only then given its name."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from snpc.errors import CheckFailed, UserError
from snpc.passes.shapes import best_binding
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds, random_feeds
from snpc.runtime.model_io import check_target, load, model_files
from snpc.runtime.noise import table_rows
from snpc.runtime.prune import CHECKED_BATCHES
from snpc.runtime.runner import open_runner
from snpc.runtime.verify import compare, outputs_of, pooled, worst
from snpc.targets import openvino, ort, trt
from snpc.targets.base import Build, Job, Made, Options, Precision, Target
from snpc.targets.precision import at_precision
from snpc.types import Difference, Model

TARGETS: dict[str, Target] = {t.name: t for t in (ort.TARGET, trt.TRT, trt.TRT_RTX, openvino.TARGET)}
EXACT = 1e-3  # relative: what another runtime's fp32 may differ by


def build(
    model: Path,
    target: str,
    output: Path | None = None,
    *,
    precision: Precision = "fp32",
    provider: str = "cpu",
    calibration: Calibration | None = None,
    batch: int = 1,
    options: Options | None = None,
) -> Build:
    """Make ``model`` into what ``target`` (a name in TARGETS) loads fastest, at ``precision``.

    ``calibration``: inputs to compare and time on, and what int8 is calibrated with; without it random inputs of
    ``batch`` samples. ``output`` default: beside the model, named after it and the target.

    Everything is written into a temporary folder beside ``output``, loaded again, run where this machine can, and
    compared with onnxruntime on ``model``; then it takes its name. Raises UserError (nothing can be built), CheckFailed
    (what was built does not hold); what was at ``output`` before stays in both cases.
    """
    start = time.perf_counter()
    chosen, asked = target_of(target), options or Options()
    chosen.refuse(precision, asked)
    if precision == "int8" and calibration is None:
        raise UserError("--precision int8 is calibrated: give --calib DATA")
    where = output or default_output(model, chosen, precision, asked)
    loaded = load(model)
    check_target(where, *model_files(model))
    feeds = feeds_for(loaded, calibration, batch)
    job = Job(model, model, where, precision, provider, feeds, asked)
    if chosen.check is not None:
        chosen.check(job)
    with staging(where) as folder:
        source, notes = at_precision(loaded, chosen, precision, calibration, folder / "work")
        job = replace(job, source=source, output=folder / where.name)
        made = chosen.make(job)
        drift, said = compared(job, made)
        files = publish(made.files, where.parent)
    total = sum(file.stat().st_size for file in files)
    seconds = time.perf_counter() - start
    return Build(
        files[0], files, chosen.name, precision, seconds, total, (*notes, *made.notes, *said), made.weights, drift
    )


def target_of(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"target {name!r}: choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def default_output(model: Path, target: Target, precision: Precision, options: Options) -> Path:
    exact = "" if precision == "fp32" else f"-{precision}"
    suffix = ".onnx" if options.emit_script else target.suffix
    return model.with_name(f"{model.stem}-{target.name}{exact}{suffix}")


def feeds_for(model: Model, calibration: Calibration | None, batch: int) -> tuple[Feeds, ...]:
    if calibration is not None:
        return tuple(islice(calibration.batches(), CHECKED_BATCHES))
    sizes, facts = best_binding(model.graph)
    return (
        random_feeds(model.inputs, batch=batch, sizes=unbatched(model, sizes), limits=table_rows(model.graph, facts)),
    )


def unbatched(model: Model, sizes: dict[str, int]) -> dict[str, int]:
    """``sizes`` without those of first axes, which are the batch."""
    leading = {spec.shape[0] for spec in model.inputs if spec.shape}
    return {name: size for name, size in sizes.items() if name not in leading}


def compared(job: Job, made: Made) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """Outputs of every loadable file against onnxruntime on the model. Raises CheckFailed where fp32 does not hold."""
    if not made.runs:
        return (), ("not run here, so outputs are not compared",)
    try:
        reference = outputs_of(job.model, list(job.feeds), "cpu")
    except UserError as error:
        return (), (f"the model itself does not run here, so outputs are not compared ({error})",)
    found: list[tuple[Difference, ...]] = []
    for file in [f for f in made.files if f.suffix in (".onnx", ".ort", ".xml")]:
        runner = open_runner(file, provider=job.provider)
        rows = [compare(a, runner.run(feeds)) for a, feeds in zip(reference, job.feeds, strict=True)]
        found.append(pooled(rows))
        if job.precision == "fp32" and worst(found[-1]) > EXACT:
            raise CheckFailed(
                f"{file.name}: its outputs differ from the model's by {worst(found[-1]):.1e} relative, "
                f"more than {EXACT:g}"
            )
    return max(found, key=worst), ()


@contextmanager
def staging(where: Path) -> Iterator[Path]:
    """A temporary folder beside ``where``, gone afterwards, with a folder ``work`` for what is not kept."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{where.name}.", dir=where.parent))
    except OSError as error:
        raise UserError(f"{where}: cannot write there ({error.strerror})") from None
    try:
        (folder / "work").mkdir()
        yield folder
    except OSError as error:
        raise UserError(f"{where}: cannot write it ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Move finished files into place, what the first one refers to before it."""
    for file in reversed(files):
        file.replace(folder / file.name)
    return tuple(folder / file.name for file in files)
