"""Calibration data from code: ``file.py:function``, iterables and callables, onnxruntime's CalibrationDataReader."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.sources import (
    CalibrationPart,
    CalibrationSource,
    HeldArrays,
    error_line,
    name_list,
    part_in_memory,
    require_inputs,
)
from snpc.runtime.calibration.text_inputs import inputs_to_give
from snpc.types import AnyArray, TensorSpec


class CalibrationReader(Protocol):
    """onnxruntime's CalibrationDataReader: one feed per call, then None. ``rewind()``, if any, is called first."""

    def get_next(self) -> Mapping[str, Any] | None: ...


CalibrationValue = Mapping[str, Any] | Iterable[Mapping[str, Any]] | CalibrationReader | Callable[[], Any]


YIELDS = "it should yield dicts of input name -> array"


def script_source(script: Path, function: str, inputs: tuple[TensorSpec, ...]) -> CalibrationSource:
    """``file.py:function``. This RUNS the user's code, with the script's folder importable while it runs."""
    label = f"{script}:{function}"
    loader = find_script_function(script, function, YIELDS)
    return CalibrationSource(label, _iterate_parts(loader, label, inputs, script), inputs, length_unknown=True)


def load_script_function(script: Path, function: str, expected: str) -> Callable[..., Any]:
    """The function of a file. Its code is RUN, now and at every call, with the script's folder importable, and its
    errors become UserErrors. ``expected`` completes "...: it should"."""
    label, found = f"{script}:{function}", find_script_function(script, function, expected)

    def call(*arguments: Any) -> Any:
        with _running_user_code(label, script, expected):
            return found(*arguments)

    return call


def find_script_function(script: Path, function: str, expected: str) -> Callable[..., Any]:
    """The function of a file as it is. The file is RUN."""
    label = f"{script}:{function}"
    if not script.is_file():
        raise UserError(f"{script} does not exist: {label} should name a Python file and a function in it")
    with _running_user_code(label, script, expected):
        module = _import_script(script)
    found = getattr(module, function, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{label}: {script.name} has no function '{function}'; it has {name_list(public)}")
    return found  # type: ignore[no-any-return]


def value_source(value: Any, inputs: tuple[TensorSpec, ...]) -> CalibrationSource:
    """A Python value: a dict of arrays (all samples), a reader, an iterable of dicts, or a callable giving one."""
    label = getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Mapping):
        return CalibrationSource(
            label, [part_in_memory(label, _copy_arrays(value, label, inputs))], inputs, allow_single_sample=False
        )
    if hasattr(value, "get_next") or isinstance(value, Iterable) or callable(value):
        return CalibrationSource(label, _iterate_parts(value, label, inputs, None), inputs, length_unknown=True)
    raise UserError(
        f"calibration data of type {label}: give a path, dicts of arrays, a function giving them, or a "
        "CalibrationDataReader"
    )


def _iterate_parts(
    value: Any, label: str, inputs: tuple[TensorSpec, ...], script: Path | None
) -> Iterator[CalibrationPart]:
    with _running_user_code(label, script):
        iterator = _open_iterator(value, label)
    end = object()
    index, store = 0, HeldArrays()
    while True:
        with _running_user_code(label, script):
            feed = next(iterator, end)
        if feed is end:
            return
        part_label = f"{label}, dict {index}"
        if not isinstance(feed, Mapping):
            raise UserError(f"{part_label}: it gave a {type(feed).__name__}, not a dict of input name -> array")
        arrays = _copy_arrays(feed, part_label, inputs)
        yield part_in_memory(part_label, store.keep(part_label, arrays))
        index += 1


def _open_iterator(value: Any, label: str) -> Iterator[Any]:
    if callable(value) and not hasattr(value, "get_next") and not isinstance(value, Iterable):
        value = value()
    if hasattr(value, "get_next"):
        if hasattr(value, "rewind"):  # onnxruntime's base class has none, most subclasses do
            value.rewind()
        get_next: Callable[[], Any] = value.get_next
        return iter(get_next, None)
    if isinstance(value, Mapping):
        return iter([value])
    if isinstance(value, Iterable):
        return iter(value)
    raise UserError(f"{label}: it gave a {type(value).__name__}, not something that yields dicts of arrays")


def _copy_arrays(feed: Mapping[str, Any], label: str, inputs: tuple[TensorSpec, ...]) -> dict[str, AnyArray]:
    """Copies of what the model takes (a generator may fill the same buffer again); other keys are not touched."""
    require_inputs(label, feed, inputs_to_give(inputs, feed))
    arrays = {}
    for spec in (spec for spec in inputs if spec.name in feed):
        try:
            arrays[spec.name] = np.array(feed[spec.name])
        except Exception as error:  # whatever the value's own conversion raises: a tensor on a GPU, ragged lists
            raise UserError(f"{label}: input '{spec.name}' is not an array ({error_line(error)})") from error
    return arrays


def _import_script(script: Path) -> Any:
    name = f"_snpc_script_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None, script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _running_user_code(label: str, script: Path | None, expected: str = YIELDS) -> Iterator[None]:
    """Run the user's code with its folder importable; its errors become UserErrors that name the code and the line."""
    folder = str(script.parent.resolve()) if script else ""
    if folder:
        sys.path.insert(0, folder)
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        message = error_line(error) + _failing_line(error, script)
        raise UserError(f"{label} raised {message}: {expected}") from error
    finally:
        if folder in sys.path:  # the script may have changed the path; what it added stays
            sys.path.remove(folder)


def _failing_line(error: BaseException, script: Path | None) -> str:
    """`` (line 12)``: the last line of the user's file on the way to the error."""
    if script is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == script.resolve()]
    return f" (line {lines[-1]})" if lines else ""
