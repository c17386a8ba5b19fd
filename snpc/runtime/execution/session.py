"""onnxruntime sessions: opening and running them, and the specs of their inputs and outputs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from snpc.errors import UserError
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.types import AnyArray, Feeds, TensorSpec

if TYPE_CHECKING:
    import onnxruntime as ort

MAX_MESSAGE = 400  # characters of onnxruntime's words: it lists all inputs of a node, which may be thousands
OptimizationLevel = Literal["all", "basic", "off"]
MemoryMode = Literal["own", "lean", "shared", "least"]

PROVIDER_SUFFIX = "ExecutionProvider"  # "CUDAExecutionProvider" is "cuda" in short, and so on

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "trt": "TensorrtExecutionProvider",
}
"""Those that sessions are set up for, by their names in short."""

# The option that chooses a device, by provider in short, and what it looks like.
DEVICE_OPTIONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("cuda", "trt", "rocm", "migraphx", "dml", "cann"), ("device_id", "[0-9]+")),
    "openvino": ("device_type", "[A-Za-z]+[A-Za-z0-9_.:,]*"),
}

# CUDA computes float32 products in TF32, with 10 bits of mantissa, unless told otherwise. Sessions of few runs neither
# wait for a trial of all convolution algorithms, nor double the memory that they hold whenever they need more.
MEASURING_ON_CUDA = {
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}

# onnxruntime's names of the types that numpy arrays can hold. int4 and float4 are missing: two values share a byte.
ORT_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "string": np.dtype(np.object_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


class SessionLoadError(UserError):
    """onnxruntime cannot open a session of a model.

    ``missing_operator``: it has no kernel for an operator, or does not know the operator of another domain; the model
    may be whole. Otherwise it refuses the model itself: types that do not match, an axis that is not there.
    """

    missing_operator = False


UNKNOWN_OPERATOR = re.compile(r"Fatal error: [^\s:]+:\S+ is not a registered function/op")  # "domain:name(version)"


def onnxruntime_version() -> str:
    import onnxruntime as ort

    return str(ort.__version__)


def open_session(
    model: Path | bytes,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    optimization: OptimizationLevel = "all",
    memory: MemoryMode = "own",
    config_entries: Mapping[str, str] | None = None,
    optimized_path: Path | None = None,
) -> ort.InferenceSession:
    """A session of a file or of a serialized model. It logs nothing; errors are raised.

    ``memory``: "own": the defaults of onnxruntime and the provider, for models that are timed. "lean": as fast, but
    each node runs as soon as its inputs are there, so that statistics do not keep their activations until the end, and
    no block of memory is reserved for a whole run. "shared": like "lean", and all such sessions allocate from one pool,
    so that dozens can be open. "least": like "shared", and each weight is held once; slower, for few runs.

    All but "own" compute float32 in full precision, and run on CUDA in place of TensorRT, which would compile an engine
    for each. The pool, and weights held once, are of the CPU provider; others allocate by themselves.

    ``config_entries``: session configuration entries by name. ``optimized_path``: file for the optimized graph.

    UserError: the provider is not in this onnxruntime or does not start (a session never falls back to the CPU
    silently), or the model does not load.
    """
    import onnxruntime as ort

    threads = execution.threads or 0
    if threads < 0:
        raise UserError(f"threads {threads} is negative; 0 lets onnxruntime choose")
    name = _model_name(model)
    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{name}: no such file" if not model.exists() else f"{name}: not a file")
    chain = provider_chain(execution, measuring=memory != "own")
    provider = chain[0][0]
    _prepare_runtime()
    _preload_cuda_libraries(provider)
    try:
        session = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            _session_options(
                threads, optimization, _memory_mode(provider, memory), config_entries or {}, optimized_path
            ),
            providers=[name for name, _ in chain],
            provider_options=[options for _, options in chain],
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        refusal = SessionLoadError(f"{name}: onnxruntime does not load it: {first_lines(error)}")
        refusal.missing_operator = lacks_operator(error)
        raise refusal from error
    if provider not in session.get_providers():
        raise UserError(f"{provider} did not start: onnxruntime has it, but not a library or device that it needs")
    return session


def lacks_operator(error: Exception) -> bool:
    """Whether onnxruntime refused a model because it does not have one of its operators."""
    return type(error).__name__ == "NotImplemented" or UNKNOWN_OPERATOR.search(str(error)) is not None


def save_optimized(
    model: Path,
    target: Path,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    file_format: Literal["ONNX", "ORT"] = "ONNX",
    external_name: str = "",
) -> None:
    """Write the graph that a session of ``model`` runs after all of onnxruntime's optimizations.

    ``external_name``: name of a file beside ``target`` for the weights. UserError: as for open_session.
    """
    config_entries: dict[str, str] = {"session.save_model_format": file_format}
    if external_name:
        config_entries["session.optimized_model_external_initializers_file_name"] = external_name
        config_entries["session.optimized_model_external_initializers_min_size_in_bytes"] = "1024"
    open_session(model, execution=execution, config_entries=config_entries, optimized_path=target)


def resolve_provider(provider: str) -> tuple[str, dict[str, str]]:
    """``cuda``, ``CUDAExecutionProvider`` or ``cuda:1`` -> the full name, and the option that chooses the device.

    UserError: this onnxruntime does not have the provider, or the provider has no such device."""
    import onnxruntime as ort

    available: list[str] = ort.get_available_providers()
    wanted, colon, device = provider.partition(":")
    full_name = next((name for name in available if wanted.lower() in _names_of(name)), None)
    if full_name is None:
        raise UserError(
            f"provider {provider!r} is not in this onnxruntime {ort.__version__}: it has "
            f"{', '.join(available)} (in short: {', '.join(_names_of(name)[0] for name in available)})"
        )
    if not colon:
        return full_name, {}
    option, pattern = DEVICE_OPTIONS.get(_names_of(full_name)[0], ("", ""))
    if not option:
        raise UserError(f"provider {provider!r}: {wanted} takes no device; leave out {':' + device!r}")
    if not re.fullmatch(pattern, device):
        example = f"{wanted}:1" if option == "device_id" else f"{wanted}:GPU"
        raise UserError(f"provider {provider!r}: {device!r} names no device; write it as {example}")
    return full_name, {option: device}


def _names_of(full_name: str) -> tuple[str, str, str]:
    """In lower case: the name in short, the one without its suffix, and the full one."""
    bare = full_name.removesuffix(PROVIDER_SUFFIX).lower()
    return {name: short for short, name in PROVIDERS.items()}.get(full_name, bare), bare, full_name.lower()


def session_inputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """Specs of the inputs. UserError: an input is not a tensor, or has a type that numpy arrays cannot hold."""
    return tuple(_tensor_spec("input", value) for value in session.get_inputs())


def session_outputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """Specs of the outputs; for a tensor of unknown rank onnxruntime reports (). UserError: as for the inputs."""
    return tuple(_tensor_spec("output", value) for value in session.get_outputs())


def run_session(session: ort.InferenceSession, feeds: Feeds, *, name: str = "model") -> dict[str, AnyArray]:
    """All outputs by name. UserError: the model does not run on these feeds (``name`` and onnxruntime's words)."""
    outputs = session_outputs(session)
    values = prepare_run(session, feeds, name=name)()
    return {spec.name: _as_array(value, spec) for spec, value in zip(outputs, values, strict=True)}


def prepare_run(session: ort.InferenceSession, feeds: Feeds, *, name: str = "model") -> Callable[[], list[Any]]:
    """A function that runs the session on ``feeds``, with no other work in it, to be timed. UserError: as run_session.

    It returns arrays, or OrtValues where an input or output has a type that onnxruntime cannot exchange with numpy.
    """
    specs = (*session_inputs(session), *session_outputs(session))
    names = [value.name for value in session.get_outputs()]
    fed = {key: np.asarray(array, order="C") for key, array in feeds.items()}
    if any(_is_ml_dtype(spec.dtype) for spec in specs):
        values = {key: _ort_value(array) for key, array in fed.items()}
        return _with_user_errors(lambda: session.run_with_ort_values(names, values), name)
    return _with_user_errors(lambda: session.run(names, fed), name)


def first_lines(error: Exception, count: int = 1) -> str:
    """The first lines of onnxruntime's message as one line; source files and a stack follow them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:MAX_MESSAGE] or type(error).__name__


def _session_options(
    threads: int,
    optimization: OptimizationLevel,
    memory: MemoryMode,
    config_entries: Mapping[str, str],
    optimized_path: Path | None,
) -> ort.SessionOptions:
    import onnxruntime as ort

    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = levels[optimization]
    # Idle threads of one session would otherwise keep spinning after a run and take the cores of the next session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if memory != "own":
        options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if memory in ("shared", "least"):
        _register_shared_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if memory == "least":
        options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in config_entries.items():
        options.add_session_config_entry(key, value)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    return options


@functools.cache
def _prepare_runtime() -> None:
    """Once, before the first session: nothing is logged, and nothing is reported to anyone."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    if hasattr(ort, "disable_telemetry_events"):
        ort.disable_telemetry_events()


@functools.cache
def _register_shared_arena() -> None:
    """Register one CPU allocator for all sessions that share it; a session's own one keeps its peak memory."""
    import onnxruntime as ort

    memory_info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # there is one already: then that serves
        ort.create_and_register_allocator(memory_info, None)


def _preload_cuda_libraries(provider: str) -> None:
    """Load CUDA's libraries first: those from Python packages are found only when they are loaded already."""
    import onnxruntime as ort

    if provider in (PROVIDERS["cuda"], PROVIDERS["trt"]) and hasattr(ort, "preload_dlls"):  # onnxruntime 1.21
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()


def provider_chain(execution: Execution, measuring: bool) -> list[tuple[str, dict[str, str]]]:
    """The provider, then those that run the nodes it cannot run, each with its options.

    ``measuring``: for sessions whose outputs count and not their time. UserError: as for ``resolve_provider``."""
    provider, device = resolve_provider(execution.provider)
    cuda = (PROVIDERS["cuda"], {**device, **(MEASURING_ON_CUDA if measuring else {})})
    chain = [(provider, device)]
    if provider == PROVIDERS["cuda"]:
        chain = [cuda]
    elif provider == PROVIDERS["trt"]:  # a package with TensorRT has CUDA
        chain = [cuda] if measuring else [(provider, device), cuda]
    elif _names_of(provider)[0] == "openvino":
        chain = [(provider, {**device, **_openvino_options(execution, measuring)})]
    return chain if provider == PROVIDERS["cpu"] else [*chain, (PROVIDERS["cpu"], {})]


def _openvino_options(execution: Execution, measuring: bool) -> dict[str, str]:
    """OpenVINO computes in bfloat16 or float16 where the device is faster so; "ACCURACY" keeps the model's types."""
    threads = {"num_of_threads": str(execution.threads)} if execution.threads else {}
    return {**threads, **({"precision": "ACCURACY"} if measuring else {})}


def _memory_mode(provider: str, memory: MemoryMode) -> MemoryMode:
    """Other providers have no use for the CPU's pool: it would replace the pinned memory that they copy through."""
    return memory if provider == PROVIDERS["cpu"] or memory == "own" else "lean"


def _tensor_spec(direction: str, value: Any) -> TensorSpec:
    element = value.type.removeprefix("tensor(").removesuffix(")")
    if element not in ORT_DTYPES:
        raise UserError(
            f"{direction} {value.name!r} is {value.type}: snpc cannot run it, since numpy arrays cannot hold this type"
        )
    return TensorSpec(value.name, ORT_DTYPES[element], tuple("" if dim is None else dim for dim in value.shape))


def _with_user_errors(run: Callable[[], Sequence[Any]], name: str) -> Callable[[], list[Any]]:
    def call() -> list[Any]:
        try:
            return list(run())
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            # The second line of the message says which axis is wrong.
            raise UserError(f"{name}: onnxruntime does not run it on these inputs: {first_lines(error, 3)}") from error

    return call


def _is_ml_dtype(dtype: np.dtype[Any]) -> bool:
    return dtype.isbuiltin == 2  # numpy's word for a type that a library adds: here ml_dtypes


def _ort_value(array: AnyArray) -> Any:
    import onnxruntime as ort
    from onnx import helper

    if not _is_ml_dtype(array.dtype):
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, helper.np_dtype_to_tensor_dtype(array.dtype))


def _as_array(value: Any, spec: TensorSpec) -> AnyArray:
    if isinstance(value, np.ndarray):
        return value
    if not _is_ml_dtype(spec.dtype):
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    # OrtValue.numpy() refuses these types; outputs that are not bound to a device are in CPU memory.
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * spec.dtype.itemsize)
    return np.frombuffer(data, spec.dtype).reshape(shape)


def _model_name(model: Path | bytes) -> str:
    return str(model) if isinstance(model, Path) else "the model in memory"
