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
from snpc.runtime.io import atomic_write
from snpc.targets.base import BuildJob, BuildOptions, BuildOutput, BuildRequest, BuildTarget
from snpc.targets.engines.attention_kernels import attention_kernels, kernel_notes, prepare_attention, whole_attentions
from snpc.targets.engines.script import TENSORRT_RTX, TRTEXEC, write_engine_script
from snpc.targets.engines.shape_profile import shape_ranges
from snpc.types import PRECISIONS

WEIGHT_MEMORY = re.compile(r"Total Weights Memory: (\d+) bytes")
LAYERS = "Layers:"  # how a message begins that lists the layers of an engine
SHAPE_OPTIONS = frozenset({"--min-shapes", "--opt-shapes", "--max-shapes"})
MISSING_TENSORRT = (
    "TensorRT is not installed: pip install 'snpc[trt]' on a machine with an NVIDIA GPU; --target trt-rtx builds "
    "without a GPU, --emit-script writes a model and a trtexec line for elsewhere"
)
MISSING_TENSORRT_RTX = "TensorRT for RTX is not installed: pip install 'snpc[trt-rtx]'"


@dataclass
class BuilderLog:
    """Messages of the builder: errors, the weight memory, which it reports nowhere else, and the layers of the engine,
    which an inspector tells only where the engine can be loaded."""

    errors: list[str] = field(default_factory=list)
    weights: int | None = None
    layers: str = ""

    def record(self, severity: Any, message: str, worst: Any) -> None:
        if severity <= worst:
            self.errors.append(message)
        if message.startswith(LAYERS):
            self.layers = message
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


@dataclass(frozen=True)
class Engine:
    """A built engine: its bytes, the weight memory that the builder reports, the text of its layers, and whether this
    machine can load it."""

    plan: bytes
    weights: int | None
    layers: str
    loads: bool


def build_engine(trt: Any, job: BuildJob) -> BuildOutput:
    """Build and write the engine of ``job``.

    A graph that was rewritten for attention is built as it was, too: the engine with more attentions in one kernel is
    written. UserError: TensorRT's own message where it refuses the model.
    """
    engine = compile_engine(trt, job, job.source)
    prepared = job.prepared
    names = prepared.attentions if prepared is not None else ()
    after, before = whole_attentions(engine.layers, names), None
    notes: list[str] = []
    if after and job.plain is not None:
        try:
            plain = compile_engine(trt, job, job.plain)
            before = whole_attentions(plain.layers, names)
        except UserError:
            notes.append("attention: the graph that was not rewritten is refused")
        if prepared is not None and prepared.padded and before is not None and len(before) >= len(after):
            engine, after = plain, before
            notes.append("attention: the graph that was not rewritten is built: it has as many in one kernel")
    kernels = attention_kernels(names, after, before)
    job.output.write_bytes(engine.plan)
    notes.append(f"{trt.__name__} {trt.__version__}, engine of {len(engine.plan)} bytes")
    if engine.weights is not None:
        notes.append(f"weight memory {engine.weights} bytes")
    notes += kernel_notes(kernels, job.precision)
    if not engine.loads:
        notes.append("not loaded: this machine has no GPU that the engine was built for")
    return BuildOutput((job.output,), tuple(notes), engine.loads, engine.weights, kernels)


def compile_engine(trt: Any, job: BuildJob, source: Path) -> Engine:
    """Parse ``source`` and build it with the options of ``job``. UserError: TensorRT's own message."""
    log = BuilderLog()
    logger = make_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # pybind11: the factory gave nothing
        raise UserError(f"{trt.__name__} does not start here ({log.cause()}): it builds on the GPU it is for") from None
    network = parse_network(trt, builder, logger, source, job.model)
    config = builder_config(trt, builder, source, job.options)
    cache = read_timing_cache(config, job.options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{job.model}: {trt.__name__} builds no engine: {log.cause()}")
    if cache is not None and job.options.timing_cache is not None:
        with atomic_write(job.options.timing_cache) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    content = bytes(memoryview(plan))
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(content) if runtime is not None else None
    return Engine(
        content, log.weights, log.layers if loaded is None else inspect_layers(trt, loaded), loaded is not None
    )


def inspect_layers(trt: Any, engine: Any) -> str:
    """The layers of a loaded engine, in the form in which the builder logs them."""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def parse_network(trt: Any, builder: Any, logger: Any, source: Path, model: Path) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        reasons = "; ".join(dict.fromkeys(parser_error_text(error) for error in errors[:3])) or "it gives no reason"
        raise UserError(f"{model}: {trt.__name__} does not parse it: {reasons}")
    return network


def parser_error_text(error: Any) -> str:
    """``MatMul node_7: what is wrong`` for an error of the parser."""
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{node}: {first_lines(Exception(error.desc()))}" if node else first_lines(Exception(error.desc()))


def builder_config(trt: Any, builder: Any, source: Path, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers then say which nodes of the graph they hold
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.sm:
        capable = compute_capabilities(trt, options.sm)
        config.num_compute_capabilities = len(capable)
        for index, one in enumerate(capable):
            config.set_compute_capability(one, index)
    ranges = shape_ranges(source, options)
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


# -- the two targets -------------------------------------------------------------------------------------------------


def build_tensorrt(job: BuildJob) -> BuildOutput:
    if job.options.emit_script:
        return write_engine_script(job, TRTEXEC)
    return build_engine(import_tensorrt("tensorrt", MISSING_TENSORRT), job)


def build_tensorrt_rtx(job: BuildJob) -> BuildOutput:
    if job.options.emit_script:
        return write_engine_script(job, TENSORRT_RTX)
    return build_engine(import_tensorrt("tensorrt_rtx", MISSING_TENSORRT_RTX), job)


def check_tensorrt(request: BuildRequest) -> None:
    if request.options.emit_script:
        check_script_suffix(request)
    else:
        import_tensorrt("tensorrt", MISSING_TENSORRT)
        check_engine_suffix(request)


def check_tensorrt_rtx(request: BuildRequest) -> None:
    if request.options.emit_script:
        check_script_suffix(request)
    else:
        compute_capabilities(import_tensorrt("tensorrt_rtx", MISSING_TENSORRT_RTX), request.options.sm)
        check_engine_suffix(request)


def check_script_suffix(request: BuildRequest) -> None:
    if request.output.suffix != ".onnx":
        raise UserError(f"{request.output}: --emit-script writes an .onnx and an .sh beside it; name the .onnx with -o")


def check_engine_suffix(request: BuildRequest) -> None:
    from snpc.runtime.execution import ENGINE_SUFFIXES

    if request.output.suffix not in ENGINE_SUFFIXES:
        raise UserError(
            f"{request.output}: an engine is named {' or '.join(ENGINE_SUFFIXES)}; give such a name with -o"
        )


TENSORRT_TARGET = BuildTarget(
    "trt",
    "TensorRT: an engine for the GPU of this machine, or with --emit-script what builds it elsewhere",
    ".engine",
    build_tensorrt,
    PRECISIONS,
    symmetric_activations=True,
    options=SHAPE_OPTIONS | {"--workspace", "--timing-cache", "--emit-script"},
    check_request=check_tensorrt,
    prepare=prepare_attention,
)
TENSORRT_RTX_TARGET = BuildTarget(
    "trt-rtx",
    "TensorRT for RTX: an engine for the compute capabilities named by --sm, built without a GPU",
    ".engine",
    build_tensorrt_rtx,
    PRECISIONS,
    symmetric_activations=True,
    options=SHAPE_OPTIONS | {"--workspace", "--sm", "--emit-script"},
    check_request=check_tensorrt_rtx,
    prepare=prepare_attention,
)
