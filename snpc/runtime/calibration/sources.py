"""What every source of calibration data is turned into: parts, whose shapes are known before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from snpc.errors import UserError
from snpc.types import AnyArray, TensorSpec


class ArrayHeader(NamedTuple):
    """What is known of an array without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class CalibrationPart:
    """A file, picture or dict. ``where`` is what messages call it; ``read(names)`` gives those arrays, as stored."""

    label: str
    headers: Mapping[str, ArrayHeader]
    read: Callable[[Sequence[str]], Mapping[str, AnyArray]]


@dataclass(frozen=True)
class CalibrationSource:
    """An opened source.

    ``inputs``: the model's inputs as the parts hold them. ``lone``: an array may be one sample without a leading axis.
    ``beginning``: the length is unknown, so the first samples are taken and iteration stops there. ``whole``: the model
    has no sample axis; ``inputs`` carry an extra leading 1, which is taken off again when a batch is fed.
    """

    label: str
    parts: Iterable[CalibrationPart]
    inputs: tuple[TensorSpec, ...]
    allow_single_sample: bool = True
    length_unknown: bool = False
    unbatched: bool = False


def part_in_memory(label: str, arrays: Mapping[str, AnyArray]) -> CalibrationPart:
    """A part that is already in memory."""
    headers = {name: ArrayHeader(array.shape, array.dtype) for name, array in arrays.items()}
    return CalibrationPart(label, headers, lambda names: {name: arrays[name] for name in names})


def name_list(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message; a decoder with a cache has far too many to print."""
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
    """``ValueError: what it said``, on one line."""
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
