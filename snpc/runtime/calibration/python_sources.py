"""Sources that are code: ``file.py:function``, Python iterables and callables, onnxruntime's CalibrationDataReader."""

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
from snpc.runtime.calibration.sources import Part, Source, listed, memory_part, one_line, require_names
from snpc.types import AnyArray, TensorSpec


class Reader(Protocol):
    """onnxruntime's CalibrationDataReader: one feed per call, then None. A ``rewind()`` is called before."""

    def get_next(self) -> Mapping[str, Any] | None: ...


Feeds = Mapping[str, Any] | Iterable[Mapping[str, Any]] | Reader | Callable[[], Any]


def script_source(script: Path, function: str, inputs: tuple[TensorSpec, ...]) -> Source:
    """``file.py:function``. This RUNS the user's code, with the script's folder importable while it runs."""
    label = f"{script}:{function}"
    if not script.is_file():
        raise UserError(f"{script} does not exist: {label} should name a Python file and a function in it")
    with _running(label, script):
        module = _imported(script)
    loader = getattr(module, function, None)
    if not callable(loader):
        there = listed(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise UserError(f"{label}: {script.name} has no function '{function}'; it has {there}")
    return Source(label, _parts(loader, label, inputs, script), inputs, beginning=True)


def value_source(value: Any, inputs: tuple[TensorSpec, ...]) -> Source:
    """A Python value: a dict of arrays (all samples), a reader, an iterable of dicts, or a callable giving one."""
    label = getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, Mapping):
        return Source(label, [memory_part(label, _arrays(value, label, inputs))], inputs, lone=False)
    if hasattr(value, "get_next") or isinstance(value, Iterable) or callable(value):
        return Source(label, _parts(value, label, inputs, None), inputs, beginning=True)
    raise UserError(
        f"calibration data of type {label}: give a path, dicts of arrays, a function giving them, or a "
        "CalibrationDataReader"
    )


def _parts(value: Any, label: str, inputs: tuple[TensorSpec, ...], script: Path | None) -> Iterator[Part]:
    with _running(label, script):
        iterator = _iterator(value, label)
    end = object()
    index = 0
    while True:
        with _running(label, script):
            feed = next(iterator, end)
        if feed is end:
            return
        where = f"{label}, dict {index}"
        if not isinstance(feed, Mapping):
            raise UserError(f"{where}: it gave a {type(feed).__name__}, not a dict of input name -> array")
        yield memory_part(where, _arrays(feed, where, inputs))
        index += 1


def _iterator(value: Any, label: str) -> Iterator[Any]:
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


def _arrays(feed: Mapping[str, Any], where: str, inputs: tuple[TensorSpec, ...]) -> dict[str, AnyArray]:
    """Copies of what the model takes (a generator may fill the same buffer again); other keys are not touched."""
    require_names(where, feed, inputs)
    arrays = {}
    for spec in inputs:
        try:
            arrays[spec.name] = np.array(feed[spec.name])
        except Exception as error:  # whatever the value's own conversion raises: a tensor on a GPU, ragged lists
            raise UserError(f"{where}: input '{spec.name}' is not an array ({one_line(error)})") from error
    return arrays


def _imported(script: Path) -> Any:
    name = f"_snpc_script_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None, script
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _running(label: str, script: Path | None) -> Iterator[None]:
    """Run the user's code: its folder importable, and whatever it raises shown as its failure and not as snpc's."""
    folder = str(script.parent.resolve()) if script else ""
    if folder:
        sys.path.insert(0, folder)
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = one_line(error) + _line(error, script)
        raise UserError(f"{label} raised {said}: it should yield dicts of input name -> array") from error
    finally:
        if folder in sys.path:  # the script may have changed the path; what it added stays
            sys.path.remove(folder)


def _line(error: BaseException, script: Path | None) -> str:
    """`` (line 12)``: the last line of the user's file on the way to the error."""
    if script is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == script.resolve()]
    return f" (line {lines[-1]})" if lines else ""
