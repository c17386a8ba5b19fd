"""Build targets TensorRT and TensorRT for RTX, whose Python interfaces are the same.

Networks are strongly typed: the graph says which precision is used where (TensorRT 11 has no other way). TensorRT for
RTX builds without a GPU, for the compute capabilities that are named.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snpc.errors import UserError
from snpc.runtime.execution import first_lines
from snpc.runtime.io import atomic_write, publish_files
from snpc.targets.base import BuildJob, BuildOptions, BuildOutput, BuildRequest, BuildTarget
from snpc.targets.shape_profile import ShapeRange, shape_ranges
from snpc.types import PRECISIONS

WEIGHT_MEMORY = re.compile(r"Total Weights Memory: (\d+) bytes")
SHAPE_OPTIONS = frozenset({"--min-shapes", "--opt-shapes", "--max-shapes"})
MISSING_TENSORRT = (
    "TensorRT is not installed: pip install 'snpc[trt]' on a machine with an NVIDIA GPU; --target trt-rtx builds "
    "without a GPU, --emit-script writes a model and a trtexec line for elsewhere"
)
MISSING_TENSORRT_RTX = "TensorRT for RTX is not installed: pip install 'snpc[trt-rtx]'"


@dataclass
class BuilderLog:
    """Messages of the builder: errors, and the weight memory, which it reports nowhere else."""

    errors: list[str] = field(default_factory=list)
    weights: int | None = None

    def record(self, severity: Any, message: str, worst: Any) -> None:
        if severity <= worst:
            self.errors.append(message)
        match = WEIGHT_MEMORY.search(message)
        if match:
            self.weights = int(match.group(1))

    def cause(self) -> str:
        return first_lines(Exception(self.errors[-1])) if self.errors else "it gives no reason"


def make_logger(trt: Any, log: BuilderLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.record(severity, message, trt.ILogger.Severity.ERROR)

    return Logger()


def import_tensorrt(name: str, missing: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(missing) from None


# -- building --------------------------------------------------------------------------------------------------------


def build_engine(trt: Any, job: BuildJob) -> BuildOutput:
    """Parse ``job.source``, build and write the engine. UserError: TensorRT's own message where it refuses the
    model."""
    log = BuilderLog()
    logger = make_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind11: the factory gave nothing
        raise UserError(f"{trt.__name__} does not start here ({log.cause()}): it builds on the GPU it is for") from None
    network = parse_network(trt, builder, logger, job)
    config = builder_config(trt, builder, network, job)
    cache = read_timing_cache(config, job.options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{job.model}: {trt.__name__} builds no engine: {log.cause()}")
    job.output.write_bytes(memoryview(plan))
    if cache is not None and job.options.timing_cache is not None:
        with atomic_write(job.options.timing_cache) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    size = len(memoryview(plan))
    notes = [f"{trt.__name__} {trt.__version__}, engine of {size} bytes"]
    if log.weights is not None:
        notes.append(f"weight memory {log.weights} bytes")
    runs = can_deserialize(trt, logger, job.output)
    if not runs:
        notes.append("not loaded: this machine has no GPU that the engine was built for")
    return BuildOutput((job.output,), tuple(notes), runs, log.weights)


def parse_network(trt: Any, builder: Any, logger: Any, job: BuildJob) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.source)):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        reasons = "; ".join(dict.fromkeys(parser_error_text(error) for error in errors[:3])) or "it gives no reason"
        raise UserError(f"{job.model}: {trt.__name__} does not parse it: {reasons}")
    return network


def parser_error_text(error: Any) -> str:
    """``MatMul node_7: what is wrong`` for an error of the parser."""
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{node}: {first_lines(Exception(error.desc()))}" if node else first_lines(Exception(error.desc()))


def builder_config(trt: Any, builder: Any, network: Any, job: BuildJob) -> Any:
    config = builder.create_builder_config()
    if job.options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.options.workspace << 20)
    if job.options.sm:
        capable = compute_capabilities(trt, job.options.sm)
        config.num_compute_capabilities = len(capable)
        for index, one in enumerate(capable):
            config.set_compute_capability(one, index)
    ranges = shape_ranges(job.source, job.options)
    if ranges:
        shapes = builder.create_optimization_profile()
        for name, span in ranges.items():
            shapes.set_shape(name, span.min, span.opt, span.max)
        config.add_optimization_profile(shapes)
    return config


def compute_capabilities(trt: Any, numbers: tuple[int, ...]) -> list[Any]:
    known = {int(name[2:]): value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    unknown = [number for number in numbers if number not in known]
    if unknown:
        named = ",".join(map(str, sorted(known)))
        raise UserError(f"--sm {unknown[0]}: {trt.__name__} {trt.__version__} builds for {named}")
    return [known[number] for number in numbers]


def read_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def can_deserialize(trt: Any, logger: Any, path: Path) -> bool:
    runtime = trt.Runtime(logger)
    return runtime is not None and runtime.deserialize_cuda_engine(path.read_bytes()) is not None


# -- the two targets -------------------------------------------------------------------------------------------------


def build_tensorrt(job: BuildJob) -> BuildOutput:
    return (
        write_trtexec_script(job)
        if job.options.emit_script
        else build_engine(import_tensorrt("tensorrt", MISSING_TENSORRT), job)
    )


def build_tensorrt_rtx(job: BuildJob) -> BuildOutput:
    return build_engine(import_tensorrt("tensorrt_rtx", MISSING_TENSORRT_RTX), job)


def check_tensorrt(request: BuildRequest) -> None:
    if request.options.emit_script and request.output.suffix != ".onnx":
        raise UserError(f"{request.output}: --emit-script writes an .onnx and an .sh beside it; name the .onnx with -o")
    if not request.options.emit_script:
        import_tensorrt("tensorrt", MISSING_TENSORRT)
        check_engine_suffix(request)


def check_tensorrt_rtx(request: BuildRequest) -> None:
    trt = import_tensorrt("tensorrt_rtx", MISSING_TENSORRT_RTX)
    compute_capabilities(trt, request.options.sm)
    check_engine_suffix(request)


def check_engine_suffix(request: BuildRequest) -> None:
    from snpc.runtime.execution import ENGINE_SUFFIXES

    if request.output.suffix not in ENGINE_SUFFIXES:
        raise UserError(
            f"{request.output}: an engine is named {' or '.join(ENGINE_SUFFIXES)}; give such a name with -o"
        )


# -- for a machine that has TensorRT ---------------------------------------------------------------------------------


def write_trtexec_script(job: BuildJob) -> BuildOutput:
    """Write the model for TensorRT, and a script with the trtexec command that builds the engine."""
    publish_files([job.source], job.output)
    shell = job.output.with_suffix(".sh")
    try:
        major = int(importlib.import_module("tensorrt").__version__.split(".")[0])
    except ImportError:
        major = None
    line = trtexec_command(job.output.name, shape_ranges(job.output, job.options), job.options, major)
    shell.write_text(f"#!/bin/sh\n{line}\n")
    shell.chmod(0o755)
    version = f"TensorRT {major}" if major else "TensorRT 10 and 11 (none is installed here)"
    return BuildOutput((job.output, shell), (f"for {version}: {line}",), runnable=False)


def trtexec_command(model: str, ranges: dict[str, ShapeRange], options: BuildOptions, major: int | None) -> str:
    """The trtexec command. TensorRT up to 10 needs a flag to keep the types of the graph; 11 always keeps them."""

    def shapes(bound: str) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, getattr(span, bound)))}" for name, span in ranges.items())

    words = ["trtexec", f"--onnx={model}", f"--saveEngine={Path(model).stem}.engine"]
    if ranges:
        words += [f"--{bound}Shapes={shapes(bound)}" for bound in ("min", "opt", "max")]
    if major is None or major <= 10:
        words.append("--stronglyTyped")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace}")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    return " ".join(words)


TENSORRT_TARGET = BuildTarget(
    "trt",
    "TensorRT: an engine for the GPU of this machine, or with --emit-script what builds it elsewhere",
    ".engine",
    build_tensorrt,
    PRECISIONS,
    symmetric_activations=True,
    options=SHAPE_OPTIONS | {"--workspace", "--timing-cache", "--emit-script"},
    extra_suffixes=(".sh",),
    check_request=check_tensorrt,
)
TENSORRT_RTX_TARGET = BuildTarget(
    "trt-rtx",
    "TensorRT for RTX: an engine for the compute capabilities named by --sm, built without a GPU",
    ".engine",
    build_tensorrt_rtx,
    PRECISIONS,
    symmetric_activations=True,
    options=SHAPE_OPTIONS | {"--workspace", "--sm"},
    check_request=check_tensorrt_rtx,
)
