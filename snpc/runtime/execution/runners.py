"""Runners: one interface to onnxruntime (.onnx, .ort) and OpenVINO IR, so that they run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import numpy as np

from snpc.errors import UserError
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.session import (
    ORT_DTYPES,
    MemoryMode,
    first_lines,
    open_session,
    prepare_run,
    run_session,
    session_inputs,
)
from snpc.types import AnyArray, Feeds, TensorSpec

if TYPE_CHECKING:
    import onnxruntime as ort

OPENVINO_SUFFIX = ".xml"
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
ARTIFACT_SUFFIXES = (".ort", OPENVINO_SUFFIX, *ENGINE_SUFFIXES)  # files that are no ONNX
PRECISION_RT_INFO = "snpc_precision"  # rt_info of an IR: the precision that it was built for


class Runner(Protocol):
    """A loaded model. ``device``: the provider or device; ``threads``: its setting, 0 where the runtime chose."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def version(self) -> str: ...

    def run(self, feeds: Feeds) -> dict[str, AnyArray]:
        """All outputs by name. UserError: it does not run on these feeds."""
        ...

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        """A function that runs on ``feeds``, with no other work in it, to be timed."""
        ...


def open_runner(path: Path, *, execution: Execution = DEFAULT_EXECUTION, memory: MemoryMode = "own") -> Runner:
    """Load ``path`` by its suffix: .xml is an OpenVINO IR, .engine, .plan and .trt are TensorRT's, the rest is
    onnxruntime's, in a session with ``memory`` as of ``open_session``. UserError: it does not load, or the machine or
    package that it needs is missing."""
    if path.suffix in (OPENVINO_SUFFIX, *ENGINE_SUFFIXES) and not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == OPENVINO_SUFFIX:
        return open_openvino(path, execution.threads or 0)
    if path.suffix in ENGINE_SUFFIXES:
        raise UserError(f"{path}: engines are not run by this version; time it with trtexec --loadEngine")
    return OnnxRuntimeRunner(path.name, open_session(path, execution=execution, memory=memory))


def stored_metadata(path: Path, execution: Execution = DEFAULT_EXECUTION) -> dict[str, str]:
    """The metadata entries of the model that an .ort or an OpenVINO IR was made of. UserError: it does not load."""
    if path.suffix == OPENVINO_SUFFIX:
        try:
            framework = ElementTree.parse(path).find("rt_info/framework")
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"{path}: cannot be read as an OpenVINO IR ({error})") from None
        return {entry.tag: entry.get("value", "") for entry in framework} if framework is not None else {}
    session = open_session(path, execution=execution, memory="least")
    return dict(session.get_modelmeta().custom_metadata_map)


@dataclass(frozen=True)
class OnnxRuntimeRunner:
    name: str
    session: ort.InferenceSession = field(repr=False)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return session_inputs(self.session)

    @property
    def device(self) -> str:
        return str(self.session.get_providers()[0])

    @property
    def threads(self) -> int:
        return int(self.session.get_session_options().intra_op_num_threads)

    @property
    def version(self) -> str:
        import onnxruntime as ort

        return f"onnxruntime {ort.__version__}"

    def run(self, feeds: Feeds) -> dict[str, AnyArray]:
        return run_session(self.session, feeds, name=self.name)

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        return prepare_run(self.session, feeds, name=self.name)


# -- OpenVINO --------------------------------------------------------------------------------------------------------


def import_openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise UserError("OpenVINO is not installed: pip install 'snpc[openvino]'") from None
    return openvino


def open_openvino(path: Path, threads: int = 0) -> OpenVinoRunner:
    """An OpenVINO IR on the CPU. One that snpc built for fp32 computes in fp32, also where the CPU could do bfloat16,
    which OpenVINO would choose by itself."""
    ov = import_openvino()
    core = ov.Core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(path)
        precision = model.get_rt_info(PRECISION_RT_INFO).astype(str) if model.has_rt_info(PRECISION_RT_INFO) else ""
        hint = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}.get(precision)
        if hint:
            settings["INFERENCE_PRECISION_HINT"] = hint
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"{path}: OpenVINO does not load it: {first_lines(error)}") from None
    return OpenVinoRunner(path.name, compiled, threads, ov.get_version().split("-")[0])


@dataclass(frozen=True)
class OpenVinoRunner:
    name: str
    compiled: Any = field(repr=False)
    threads: int
    release: str

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(port.get_any_name(), openvino_dtype(port), tuple(openvino_shape(port)))
            for port in self.compiled.inputs
        )

    @property
    def device(self) -> str:
        return "OpenVINO CPU"

    @property
    def version(self) -> str:
        return f"OpenVINO {self.release}"

    def run(self, feeds: Feeds) -> dict[str, AnyArray]:
        request = self.compiled.create_infer_request()
        results = self._refusing(lambda: request.infer(dict(feeds)))()
        return {port.get_any_name(): np.array(results[port]) for port in self.compiled.outputs}

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        request = self.compiled.create_infer_request()
        arrays = dict(feeds)
        return self._refusing(lambda: request.infer(arrays, share_inputs=True, share_outputs=True))

    def _refusing(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return call()
            except RuntimeError as error:
                raise UserError(
                    f"{self.name}: OpenVINO does not run it on these inputs: {first_lines(error, 3)}"
                ) from None

        return run


def openvino_dtype(port: Any) -> np.dtype[Any]:
    name = port.get_element_type().get_type_name()
    short = {"f32": "float", "f64": "double", "f16": "float16", "bf16": "bfloat16", "boolean": "bool"}
    long = {f"{sign}{bits}": f"{'u' if sign == 'u' else ''}int{bits}" for sign in "iu" for bits in (8, 16, 32, 64)}
    return ORT_DTYPES[{**short, **long}[name]]


def openvino_shape(port: Any) -> list[int | str]:
    return ["" if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
