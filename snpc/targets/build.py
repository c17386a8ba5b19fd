"""Building artifacts: cast or quantize a model, build it for a target, load the result and compare its outputs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from snpc.errors import CheckFailed, UserError
from snpc.graph import choose_dim_sizes, leading_dims
from snpc.planning import write_provenance
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import (
    VERIFICATION_BATCHES,
    OutputMetrics,
    TimedArtifact,
    batch_differences,
    max_relative,
    run_batches,
)
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    ENGINE_SUFFIXES,
    Execution,
    embedding_rows,
    open_runner,
    random_feeds,
)
from snpc.runtime.io import (
    check_target,
    load,
    model_files,
    publish_files,
    refuse_branches,
    staging_folder,
    write_errors,
)
from snpc.targets import onnxruntime as ort
from snpc.targets import openvino
from snpc.targets.base import (
    FP32_TOLERANCE,
    BuildJob,
    BuildOptions,
    BuildOutput,
    BuildRequest,
    BuildResult,
    BuildTarget,
)
from snpc.targets.cast import cast_model
from snpc.targets.engines import TENSORRT_RTX_TARGET, TENSORRT_TARGET
from snpc.types import Difference, Feeds, Model, Precision

TARGETS: dict[str, BuildTarget] = {
    t.name: t for t in (ort.ONNXRUNTIME_TARGET, TENSORRT_TARGET, TENSORRT_RTX_TARGET, openvino.OPENVINO_TARGET)
}


def build(
    model: Path | str,
    target: str,
    output: Path | str | None = None,
    *,
    precision: Precision = "fp32",
    execution: Execution = DEFAULT_EXECUTION,
    calibration: Calibration | None = None,
    batch: int = 1,
    options: BuildOptions | None = None,
) -> BuildResult:
    """Build ``model`` for ``target`` (a name in TARGETS) at ``precision``.

    ``calibration``: inputs to compare on and to calibrate int8 with; without it random inputs. ``batch``: samples in
    the batch that is timed, where a target chooses by time. ``output``: by default beside the model, named after it and
    the target.

    The artifact is written into a temporary folder beside ``output``, loaded, run where this machine can run it, and
    compared with ``model`` in onnxruntime; then it is renamed into place. Raises UserError (it cannot be built) or
    CheckFailed (its outputs are wrong); a file that was at ``output`` stays in both cases.
    """
    start = time.perf_counter()
    options_given = options or BuildOptions()
    model, output = Path(model), Path(output) if output is not None else None
    output_path = check_build(model, target, output, precision, execution, calibration is not None, options_given)
    build_target, loaded = find_target(target), load(model, execution.observer)
    refuse_branches(loaded, "build")
    cache = (options_given.timing_cache,) if options_given.timing_cache is not None else ()
    for path in (*build_target.paths(output_path, options_given), *cache):
        check_target(path, *model_files(model))
    drawn = default_feeds(loaded, batch, options_given.dim_sizes)
    feeds: tuple[Feeds, ...] = (drawn,)
    if calibration is not None:  # samples that int8 was not calibrated on, if there are any
        feeds = tuple(islice((calibration.held_out or calibration).batches(), VERIFICATION_BATCHES))
    job = BuildJob(output_path, precision, execution, options_given, model, model, feeds, drawn)
    with staging_folder(output_path) as folder, write_errors(output_path), execution.progress.stage("build", 1):
        work = folder / "work"
        work.mkdir()
        job, notes = prepare_job(
            replace(job, output=folder / output_path.name),
            signed(loaded, build_target.name, precision, calibration),
            build_target,
            calibration,
            work,
        )
        written = build_target.build(job)
        drift, remarks = compare_artifact(job, written)
        files = publish_files(written.files, output_path.parent / written.files[0].name)
    total = sum(file.stat().st_size for file in files)
    seconds = time.perf_counter() - start
    return BuildResult(
        path=files[0],
        files=files,
        target=build_target.name,
        precision=precision,
        seconds=seconds,
        bytes=total,
        notes=(*notes, *written.notes, *remarks),
        weight_bytes=written.weight_bytes,
        drift=drift,
        attentions=written.attentions,
    )


def signed(model: Model, target: str, precision: Precision, calibration: Calibration | None) -> Model:
    """The model with the entries that say what is built of it."""
    data = calibration.describe() if calibration is not None and precision == "int8" else ""
    graph = model.graph.clone()
    write_provenance(graph, model, {"step": "build", "runtime": target, "precision": precision, "calibration": data})
    return replace(model, graph=graph)


def prepare_job(
    job: BuildJob, model: Model, target: BuildTarget, calibration: Calibration | None, folder: Path
) -> tuple[BuildJob, tuple[str, ...]]:
    """The job with its sources: the model as the target rewrites it, and as it was, at the precision; and notes."""
    if target.prepare is None:
        source, notes = cast_model(model, target, job.precision, calibration, folder)
        return replace(job, source=source), notes
    prepared = target.prepare(model, job, folder)
    source, notes = cast_model(prepared.model, target, job.precision, calibration, folder)
    plain = None
    if prepared.rewritten and job.precision != "int8":  # quantized attention is never one kernel
        beside = folder / "plain"
        beside.mkdir()
        plain, _ = cast_model(model, target, job.precision, calibration, beside)
    return replace(job, source=source, plain=plain, prepared=prepared), (*prepared.notes, *notes)


def check_build(
    model: Path,
    target: str,
    output: Path | None,
    precision: Precision,
    execution: Execution,
    calibrated: bool,
    options: BuildOptions,
) -> Path:
    """The path of the artifact. UserError for a request that this machine cannot build, whatever the model."""
    build_target = find_target(target)
    build_target.check_supported(precision, options)
    if precision == "int8" and not calibrated:
        raise UserError("--precision int8 is calibrated: give --calib DATA")
    output_path = output or default_output(model, build_target, precision, options)
    if build_target.check_request is not None:
        build_target.check_request(BuildRequest(output_path, precision, execution, options))
    return output_path


def timed_artifact(
    target: str,
    *,
    precision: Precision = "fp32",
    execution: Execution = DEFAULT_EXECUTION,
    calibration: Calibration | None = None,
    batch: int = 1,
    options: BuildOptions | None = None,
) -> TimedArtifact:
    """The artifact to measure a latency on (``Workload.artifact``) where a model is built afterwards.

    Raises UserError for a target whose artifacts snpc cannot time.
    """
    build_target, options_given = find_target(target), options or BuildOptions()
    if build_target.suffix in ENGINE_SUFFIXES:
        raise UserError(
            f"snpc does not run engines, so it cannot time what it builds for {target}: leave out --build to time "
            "onnxruntime, and build afterwards"
        )
    check_build(Path("model.onnx"), target, None, precision, execution, calibration is not None, options_given)

    def make(model: Path, folder: Path) -> Path:
        output = folder / f"model{build_target.suffix}"
        data = calibration if precision == "int8" else None
        return build(
            model,
            target,
            output,
            precision=precision,
            execution=execution,
            calibration=data,
            batch=batch,
            options=options_given,
        ).path

    return TimedArtifact(f"{target} in {precision}", make)


def find_target(name: str) -> BuildTarget:
    if name not in TARGETS:
        raise UserError(f"target {name!r}: choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def default_output(model: Path, target: BuildTarget, precision: Precision, options: BuildOptions) -> Path:
    exact = "" if precision == "fp32" else f"-{precision}"
    suffix = ".onnx" if options.emit_script else target.suffix
    return model.with_name(f"{model.stem}-{target.name}{exact}{suffix}")


def default_feeds(model: Model, batch: int, given: Mapping[str, int]) -> Feeds:
    """Random inputs of ``batch`` samples at sizes that the graph takes, and at those that are ``given``."""
    dim_sizes, facts = choose_dim_sizes(model.graph, given)
    wanted = {**dict.fromkeys(leading_dims(model.graph.graph), batch), **given}
    sizes = dim_sizes.resized(wanted, given)
    return random_feeds(model.inputs, batch=batch, dim_sizes=sizes, id_limits=embedding_rows(model.graph, facts))


def compare_artifact(job: BuildJob, written: BuildOutput) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """The largest differences of a built file from the model in onnxruntime, and notes where nothing was compared.

    Raises CheckFailed where the outputs in fp32 differ by more than ``FP32_TOLERANCE``.
    """
    if not written.runnable:
        return (), ("this machine cannot run it, so outputs are not compared",)
    try:
        reference = run_batches(job.model, list(job.feeds))
    except UserError as error:
        return (), (f"the model itself does not run on this machine, so outputs are not compared ({error})",)
    differences: list[tuple[Difference, ...]] = []
    metrics = OutputMetrics.of_model(load(job.model))
    for file in [f for f in written.files if f.suffix in (".onnx", ".ort", ".xml")]:
        runner = open_runner(file, execution=job.execution, memory="lean")
        differences.append(batch_differences(reference, [runner.run(feeds) for feeds in job.feeds], metrics))
        if job.precision == "fp32" and max_relative(differences[-1]) > FP32_TOLERANCE:
            raise CheckFailed(
                f"{file.name}: its outputs differ from the model's by {max_relative(differences[-1]):.1e} relative, "
                f"more than {FP32_TOLERANCE:g}"
            )
    return max(differences, key=max_relative), ()
