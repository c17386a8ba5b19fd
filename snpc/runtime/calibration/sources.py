"""The form of every source of calibration data: parts, whose shapes are known before their values are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from snpc.errors import UserError
from snpc.runtime.io import ArrayHeader, SpillFiles
from snpc.types import AnyArray, IntArray, Shape, TensorSpec

MAX_HELD_BYTES = 256 << 20  # of arrays that are made once, in memory; the others lie in temporary files

FilledKind = Literal["ones", "counted", "zeros", "empty", "false"]
"""What an input is filled with that data lacks."""


@dataclass(frozen=True)
class CalibrationPart:
    """A file, picture or dict. ``label`` names it in messages; ``read(names)`` gives these arrays as stored, and can be
    sent to another process. ``filled``: what was added to it, and how (``text_inputs``)."""

    label: str
    headers: Mapping[str, ArrayHeader]
    read: Callable[[Sequence[str]], Mapping[str, AnyArray]]
    filled: Mapping[str, FilledKind] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFormat:
    """How pictures become the image input of a model: their size, (pixel / 255 - ``mean``) / ``std`` by channel, and
    where the channel axis is. ``raw``: the pixels themselves instead."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["nchw", "nhwc"]
    raw: bool

    def describe(self) -> str:
        """``224x224, mean 0.485,0.456,0.406, std 0.229,0.224,0.225, nchw``"""
        scaled = f"mean {comma_separated(self.mean)}, std {comma_separated(self.std)}"
        return f"{self.height}x{self.width}, {'raw pixels' if self.raw else scaled}, {self.layout}"


def comma_separated(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class CalibrationSource:
    """An opened source of calibration data.

    ``inputs``: the model's inputs as the parts hold them. ``allow_single_sample``: an array may be one sample without a
    leading axis. ``length_unknown``: the first samples are taken and iteration stops there. ``unbatched``: the model
    has no sample axis; ``inputs`` have an extra leading 1, which is removed again when a batch is fed. ``images``: how
    pictures are prepared, where the parts are pictures. ``token_format``: how text became tokens, where it is text.
    """

    label: str
    parts: Iterable[CalibrationPart]
    inputs: tuple[TensorSpec, ...]
    allow_single_sample: bool = True
    length_unknown: bool = False
    unbatched: bool = False
    images: ImageFormat | None = None
    token_format: str = ""


def part_in_memory(label: str, arrays: Mapping[str, AnyArray]) -> CalibrationPart:
    """A part whose arrays are in memory."""
    headers = {name: ArrayHeader(array.shape, array.dtype) for name, array in arrays.items()}
    return CalibrationPart(label, headers, ArraysInMemory(arrays))


@dataclass(frozen=True)
class ArraysInMemory:
    """Reads arrays that are in memory."""

    arrays: Mapping[str, AnyArray]

    def __call__(self, names: Sequence[str]) -> dict[str, AnyArray]:
        return {name: self.arrays[name] for name in names}

    def only(self, rows: IntArray, sampled: Collection[str]) -> RowsInMemory:
        """A reader that holds these rows alone. ``sampled``: the arrays whose leading axis is samples."""
        arrays = {name: array[rows] if name in sampled else array for name, array in self.arrays.items()}
        return RowsInMemory(arrays, rows, {name: self.arrays[name].shape for name in sampled})


@dataclass(frozen=True)
class RowsInMemory:
    """Reads arrays of which some ``rows`` are in memory; the others hold no values. ``shapes``: of the whole arrays
    whose leading axis is samples."""

    arrays: Mapping[str, AnyArray]
    rows: IntArray
    shapes: Mapping[str, Shape]

    def __call__(self, names: Sequence[str]) -> dict[str, AnyArray]:
        read = {}
        for name in names:
            read[name] = self.arrays[name]
            if name in self.shapes:
                read[name] = np.empty(self.shapes[name], self.arrays[name].dtype)
                read[name][self.rows] = self.arrays[name]
        return read


@dataclass
class HeldArrays:
    """Keeps arrays that are made once, the first of them in memory. ``held``: bytes so far."""

    held: int = 0
    files: SpillFiles = field(default_factory=SpillFiles)

    def keep(self, label: str, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The arrays, or copies in temporary files. Raises UserError where there is no room for these."""
        self.held += sum(array.nbytes for array in arrays.values())
        if self.held <= MAX_HELD_BYTES:
            return dict(arrays)
        with as_user_error(label, "no room in the folder for temporary files: set TMPDIR", OSError):
            return {name: self.files.keep(array) for name, array in arrays.items()}


def name_list(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, at most ``limit`` of them: a decoder with a cache has hundreds of inputs."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more if every else "nothing"


def require_inputs(label: str, present: Iterable[str], inputs: Sequence[TensorSpec]) -> None:
    """UserError unless every input has data."""
    present_names = list(map(str, present))
    missing = [spec.name for spec in inputs if spec.name not in present_names]
    if missing:
        raise UserError(
            f"{label}: no data for input {name_list(missing)}; it holds {name_list(present_names)}: "
            "name arrays as the model's inputs"
        )


def error_line(error: BaseException) -> str:
    """``ValueError: its message``, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def as_user_error(label: str, advice: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn what a reader raises on a broken file into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{label}: {error_line(error)}: {advice}") from error
