"""onnxruntime sessions: one way to open and run them, and what goes in and comes out."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
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

OptimizationLevel = Literal["all", "basic", "off"]
MemoryMode = Literal["own", "lean", "shared", "least"]

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "trt": "TensorrtExecutionProvider",
}

# onnxruntime's names of what an array can hold element by element; its int4 and float4 are packed, two to a byte.
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
    """onnxruntime makes no session of a model: an operator that it does not have, types that do not fit."""


def onnxruntime_version() -> str:
    import onnxruntime as ort

    return str(ort.__version__)


def open_session(
    model: Path | bytes,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    optimise: OptimizationLevel = "all",
    memory: MemoryMode = "own",
    entries: Mapping[str, str] | None = None,
    saved: Path | None = None,
) -> ort.InferenceSession:
    """A session of a file or of a serialised model, that logs nothing but crashes (errors are raised).

    ``memory``: "own" as onnxruntime has it, for what is timed; "lean" as fast, but nodes run as soon as they can, so
    that a statistic does not keep its activations until the end, and no block for a whole run is set aside; "shared"
    takes what a run needs from one pool with all other such sessions, too, of which dozens may be open; "least" holds
    each weight once as well: slower, for few runs.

    ``entries``: settings of the session's configuration by name; ``saved``: where to write the optimised graph.

    UserError: the provider is not in this
    onnxruntime or does not start (a session never falls back to the CPU unsaid), or the model does not load.
    """
    import onnxruntime as ort

    threads = execution.threads or 0
    if threads < 0:
        raise UserError(f"threads {threads} is negative; 0 lets onnxruntime choose")
    name = _model_name(model)
    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{name}: no such file" if not model.exists() else f"{name}: not a file")
    wanted = resolve_provider(execution.provider)
    ort.set_default_logger_severity(4)
    _preload_cuda_libraries(wanted)
    try:
        session = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            _session_options(threads, optimise, memory, entries or {}, saved),
            providers=_provider_chain(wanted),
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise SessionLoadError(f"{name}: onnxruntime does not load it: {first_lines(error)}") from error
    if wanted not in session.get_providers():
        raise UserError(f"{wanted} did not start: onnxruntime has it, but not a library or device that it needs")
    return session


def save_optimized(
    model: Path,
    target: Path,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    form: Literal["ONNX", "ORT"] = "ONNX",
    external: str = "",
) -> None:
    """Write the graph that a session of ``model`` runs after all of onnxruntime's optimisations.

    ``external``: name of a file beside ``target`` for the weights. UserError: as for open_session.
    """
    entries: dict[str, str] = {"session.save_model_format": form}
    if external:
        entries["session.optimized_model_external_initializers_file_name"] = external
        entries["session.optimized_model_external_initializers_min_size_in_bytes"] = "1024"
    open_session(model, execution=execution, entries=entries, saved=target)


def resolve_provider(provider: str) -> str:
    """``cuda`` or ``CUDAExecutionProvider`` -> the full name. UserError: this onnxruntime does not have it."""
    import onnxruntime as ort

    available: list[str] = ort.get_available_providers()
    full = {name.lower(): name for name in available}
    wanted = PROVIDERS.get(provider.lower(), provider)
    if wanted.lower() not in full:
        short = [key for key, name in PROVIDERS.items() if name in available]
        raise UserError(
            f"provider {provider!r} is not in this onnxruntime {ort.__version__}: it has "
            f"{', '.join(available)} (in short: {', '.join(short)})"
        )
    return full[wanted.lower()]


def session_inputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """What must be fed. UserError: an input is no tensor, or of a type no array holds."""
    return tuple(_tensor_spec("input", value) for value in session.get_inputs())


def session_outputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """What comes out; onnxruntime gives a tensor of unknown rank the shape (). UserError: as for the inputs."""
    return tuple(_tensor_spec("output", value) for value in session.get_outputs())


def run_session(session: ort.InferenceSession, feeds: Feeds, *, name: str = "model") -> dict[str, AnyArray]:
    """All outputs by name. UserError: the model does not run on these feeds (``name`` and onnxruntime's words)."""
    outputs = session_outputs(session)
    values = prepare_run(session, feeds, name=name)()
    return {spec.name: _as_array(value, spec) for spec, value in zip(outputs, values, strict=True)}


def prepare_run(session: ort.InferenceSession, feeds: Feeds, *, name: str = "model") -> Callable[[], list[Any]]:
    """A call that runs the session on ``feeds`` and nothing else: fit to be timed. UserError: as for run_session.

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
    """How onnxruntime's message begins, as one line; what follows is its source files and stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def _session_options(
    threads: int, optimise: OptimizationLevel, memory: MemoryMode, entries: Mapping[str, str], saved: Path | None
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
    options.graph_optimization_level = levels[optimise]
    # Idle threads would spin on after a run and take the cores from the next session's: several are open at a time.
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
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return options


@functools.cache
def _register_shared_arena() -> None:
    """Memory on the CPU for all sessions that share it. Each session's own would keep the most that it ever needed."""
    import onnxruntime as ort

    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # there is one already: then that serves
        ort.create_and_register_allocator(where, None)


def _preload_cuda_libraries(wanted: str) -> None:
    """CUDA's libraries, when they came as Python packages, are found only if loaded before the session."""
    import onnxruntime as ort

    if wanted in (PROVIDERS["cuda"], PROVIDERS["trt"]) and hasattr(ort, "preload_dlls"):  # onnxruntime 1.21
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()


def _provider_chain(wanted: str) -> list[str]:
    """``wanted`` and what takes the nodes that it does not have."""
    import onnxruntime as ort

    chain = [wanted, PROVIDERS["cpu"]]
    if wanted == PROVIDERS["trt"]:
        chain.insert(1, PROVIDERS["cuda"])
    available = ort.get_available_providers()
    return [name for name in dict.fromkeys(chain) if name in available]


def _tensor_spec(kind: str, value: Any) -> TensorSpec:
    element = value.type.removeprefix("tensor(").removesuffix(")")
    if element not in ORT_DTYPES:
        raise UserError(f"{kind} {value.name!r} is {value.type}: no array holds it, so it cannot be run here")
    return TensorSpec(value.name, ORT_DTYPES[element], tuple("" if dim is None else dim for dim in value.shape))


def _with_user_errors(run: Callable[[], Sequence[Any]], name: str) -> Callable[[], list[Any]]:
    def call() -> list[Any]:
        try:
            return list(run())
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            # Which axis is wrong stands in the second line.
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
    # OrtValue.numpy() refuses these types; outputs that were not bound to a device lie in the CPU's memory.
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * spec.dtype.itemsize)
    return np.frombuffer(data, spec.dtype).reshape(shape)


def _model_name(model: Path | bytes) -> str:
    return str(model) if isinstance(model, Path) else "the model in memory"
