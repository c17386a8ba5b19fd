"""Feeds for a model: shapes as users write them, seeded random arrays, and checks of arrays."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from snpc.errors import UserError
from snpc.graph import is_cache_name
from snpc.types import AnyArray, Feeds, Shape, TensorSpec, shape_text

DEFAULT_DIM_SIZE = 16  # of a dynamic axis without a given size
DEFAULT_ID_LIMIT = 2  # random ids are 0 or 1: inside every embedding table

MAX_RANDOM_BYTES = 1 << 32  # bytes of one random input, as float64


@dataclass(frozen=True)
class RandomInputs:
    """Inputs to draw where there is no data; the fields are those of ``random_feeds``."""

    batch: int = 1
    shapes: Mapping[str, Shape] | None = None
    dim_sizes: Mapping[str, int] | None = None
    id_limits: Mapping[str, int] | None = None
    seed: int = 0

    def draw(self, inputs: Sequence[TensorSpec]) -> dict[str, AnyArray]:
        """One feed for these inputs. UserError: as for ``random_feeds``."""
        return random_feeds(
            inputs,
            batch=self.batch,
            shapes=self.shapes,
            dim_sizes=self.dim_sizes,
            seed=self.seed,
            id_limits=self.id_limits,
        )


def parse_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """``["x:1,3,224,224 y:1x16", "z:[1, 8]", "s:[]"]`` -> shape by input name; ``[]`` is a scalar.

    The last colon parts name and shape (TensorFlow's names hold colons). UserError: a text that is no shape, or an
    input named twice.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        for word in _without_inner_spaces(text).split():
            name, shape = _parse_shape(word)
            if name in shapes:
                raise UserError(f"input shape {word!r}: {name!r} has a shape already; give each input once")
            shapes[name] = shape
    return shapes


def random_feeds(
    inputs: Sequence[TensorSpec],
    *,
    batch: int = 1,
    shapes: Mapping[str, Shape] | None = None,
    dim_sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    id_limits: Mapping[str, int] | None = None,
) -> dict[str, AnyArray]:
    """Seeded arrays for ``inputs``: floats standard normal, ids uniform in [0, limit), masks and bools ones.

    A dynamic first axis is the batch. Other dynamic axes take their size from ``dim_sizes`` (names that no input has
    are ignored; an axis without a name is called INPUT.AXIS); without one it is 0 where only past keys and values have
    the axis, else 16. Equal names get equal sizes, also those that a shape in ``shapes`` binds; a name such as
    "past + new" is the sum of its terms. Ids of an input are below its entry in ``id_limits``, else below 2. Its values
    depend on ``seed`` and its name alone.
    UserError: a shape that does not fit its input, or a type without random values.
    """
    shapes, dim_sizes, id_limits = shapes or {}, dim_sizes or {}, id_limits or {}
    _check_counts(batch, seed, dim_sizes, id_limits)
    _check_names(inputs, shapes)
    bound = _bind_dims(inputs, batch, shapes, dim_sizes)
    return {
        spec.name: _random_array(
            spec,
            shapes[spec.name] if spec.name in shapes else _resolve_shape(spec, bound, batch),
            np.random.default_rng([seed, zlib.crc32(spec.name.encode())]),
            id_limits.get(spec.name, DEFAULT_ID_LIMIT),
        )
        for spec in inputs
    }


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, AnyArray]:
    """The entries of ``feeds`` for ``inputs``. UserError: an input is missing, or its type or shape does not fit."""
    missing = [spec.name for spec in inputs if spec.name not in feeds]
    if missing:
        raise UserError(f"the data has no {_quoted_names(missing)}; it has {_quoted_names(feeds)}")
    for spec in inputs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            raise UserError(f"input {spec.name!r}: the data is {array.dtype}, the model takes {spec.dtype}")
        check_shape(spec, array.shape)
    return {spec.name: feeds[spec.name] for spec in inputs}


def check_shape(spec: TensorSpec, shape: Shape) -> None:
    """UserError unless ``shape`` has the input's rank and its static sizes."""
    fits = len(shape) == len(spec.shape) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise UserError(f"input {spec.name!r}: shape {shape_text(shape)} does not fit {shape_text(spec.shape)}")


def _without_inner_spaces(text: str) -> str:
    """Spaces separate shapes, except those around a comma or inside brackets."""
    return re.sub(r"\s*,\s*|(?<=\[)\s+|\s+(?=\])", lambda match: match.group().strip(), text)


def _parse_shape(word: str) -> tuple[str, Shape]:
    name, colon, text = word.rpartition(":")
    if not colon or not name:
        raise UserError(f"input shape {word!r} names no input; write it as name:1,3,224,224")
    if text == "[]":
        return name, ()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    sizes = re.split("[,x]", text)
    if not all(re.fullmatch("[0-9]{1,12}", size) for size in sizes):
        raise UserError(f"input shape {word!r}: {text!r} is not a list of sizes; write it as {name}:1,3,224,224")
    return name, tuple(int(size) for size in sizes)


def _check_counts(batch: int, seed: int, dim_sizes: Mapping[str, int], id_limits: Mapping[str, int]) -> None:
    if batch < 1:
        raise UserError(f"batch {batch} is not positive")
    if seed < 0:
        raise UserError(f"seed {seed} is negative")
    for name, size in dim_sizes.items():
        if size < 0:
            raise UserError(f"size {size} of dynamic axis {name!r} is negative")
    for name, limit in id_limits.items():
        if limit < 1:
            raise UserError(f"input {name!r}: no id is in [0, {limit})")


def _check_names(inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> None:
    known = [spec.name for spec in inputs]
    unknown = [name for name in shapes if name not in known]
    if unknown:
        raise UserError(f"a shape is given for {_quoted_names(unknown)}, but the inputs are {_quoted_names(known)}")


def _bind_dims(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Shape], dim_sizes: Mapping[str, int]
) -> dict[str, int]:
    """The size of every axis name: from ``dim_sizes`` and ``shapes`` first, then the batch, then the defaults."""
    bound = dict(dim_sizes)
    for spec in inputs:
        if spec.name not in shapes:
            continue
        check_shape(spec, shapes[spec.name])
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True):
            if isinstance(dim, str) and dim and bound.setdefault(dim, size) != size:
                raise UserError(f"input {spec.name!r}: axis {dim!r} is {size} here and {bound[dim]} elsewhere")
    for name in _batch_names(inputs):
        bound.setdefault(name, batch)
    current = {dim for spec in inputs if not is_cache_name(spec.name) for dim in spec.shape}
    past = {dim for spec in inputs if is_cache_name(spec.name) for dim in spec.shape} - current
    for spec in inputs:
        for name in (term for dim in spec.shape for term in _term_names(dim)):
            bound.setdefault(name, 0 if name in past else DEFAULT_DIM_SIZE)
    return bound


def _batch_names(inputs: Sequence[TensorSpec]) -> set[str]:
    """Names of first axes, without a vector's name that is an inner axis elsewhere (position_ids: [sequence])."""
    inner = {dim for spec in inputs for dim in spec.shape[1:]}
    return {
        dim
        for spec in inputs
        for dim in spec.shape[:1]
        if isinstance(dim, str) and dim and "+" not in dim and (len(spec.shape) > 1 or dim not in inner)
    }


def _resolve_shape(spec: TensorSpec, bound: Mapping[str, int], batch: int) -> Shape:
    return tuple(_axis_size(spec, axis, bound, batch) for axis in range(len(spec.shape)))


def _axis_size(spec: TensorSpec, axis: int, bound: Mapping[str, int], batch: int) -> int:
    dim = spec.shape[axis]
    if isinstance(dim, int):
        return dim
    name = dim or f"{spec.name}.{axis}"
    if name in bound:
        return bound[name]
    if dim:
        return sum(int(term) for term in _sum_terms(dim) if term.isdecimal()) + sum(
            bound[term] for term in _term_names(dim)
        )
    if axis == 0:
        return batch
    return 0 if is_cache_name(spec.name) else DEFAULT_DIM_SIZE


def _sum_terms(dim: str) -> list[str]:
    return [term.strip() for term in dim.split("+")]


def _term_names(dim: int | str) -> list[str]:
    """The names in an axis: "past + 1" -> ["past"]; exporters name the axis of a mask by such a sum."""
    return [term for term in _sum_terms(dim) if term and not term.isdecimal()] if isinstance(dim, str) else []


def _random_array(spec: TensorSpec, shape: Shape, rng: np.random.Generator, limit: int) -> AnyArray:
    # By name, since numpy calls bfloat16, float8 and int4 all "void" (they are ml_dtypes').
    type_name = spec.dtype.name
    if any(n < 0 for n in shape):
        raise UserError(f"input {spec.name!r} would be {list(shape)}: no array has that shape; export the model again")
    if math.prod(shape) * 8 > MAX_RANDOM_BYTES:
        raise UserError(f"input {spec.name!r} would be {list(shape)}: too large for random values; give data for it")
    if type_name == "bool" or ("mask" in spec.name.lower() and ("int" in type_name or "float" in type_name)):
        return np.ones(shape, spec.dtype)
    if "float" in type_name:
        return rng.standard_normal(shape).astype(spec.dtype)
    if "int" in type_name:
        return rng.integers(0, min(limit, _max_value(spec.dtype)), shape).astype(spec.dtype)
    raise UserError(f"input {spec.name!r} is {type_name}, which has no random values; give data for it")


def _max_value(dtype: np.dtype[Any]) -> int:
    iinfo: Any = ml_dtypes.iinfo  # untyped, and numpy's does not know int4
    return min(int(iinfo(dtype).max), np.iinfo(np.int64).max)


def _quoted_names(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
