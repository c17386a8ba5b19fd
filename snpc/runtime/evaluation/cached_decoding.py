"""Decoding through caches: token by token it must give what all tokens at once give.

Sliced against masked says that one run is right. A cache leaves the model and comes back in the next run; whether that
still fits together is seen by doing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.errors import UserError
from snpc.runtime.execution import RunFunction
from snpc.types import AnyArray, Model, TensorSpec

PROMPT, STEPS = 6, 2  # tokens that are read at once, and tokens behind them that are read one by one
ID_LIMIT = 16  # ids are drawn below it


@dataclass(frozen=True)
class CacheInterface:
    """Inputs and outputs of a decoder. ``ids`` [batch, tokens]; ``positions`` the same; ``masks`` [batch, past +
    tokens]. ``presents``: past input [batch, heads, past, width] -> the output that continues it."""

    ids: TensorSpec
    positions: tuple[TensorSpec, ...]
    masks: tuple[TensorSpec, ...]
    pasts: tuple[TensorSpec, ...]
    presents: Mapping[str, str]
    logits: str

    def feeds(self, ids: AnyArray, start: int, caches: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The inputs for ``ids`` [1, tokens] behind ``start`` tokens in ``caches``."""
        count = ids.shape[1]
        positions = {spec.name: np.arange(start, start + count, dtype=spec.dtype)[None] for spec in self.positions}
        masks = {spec.name: np.ones((1, start + count), spec.dtype) for spec in self.masks}
        return {self.ids.name: ids, **positions, **masks, **caches}

    def empty_caches(self) -> dict[str, AnyArray]:
        return {
            spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype)  # type: ignore[arg-type]
            for spec in self.pasts
        }


def cache_interface(model: Model) -> CacheInterface | None:
    """By names and shapes; None where an input is of no known kind, or a cache has no output."""
    pasts = tuple(spec for spec in model.inputs if is_past(spec))
    rest = [spec for spec in model.inputs if not is_past(spec)]
    masks = tuple(spec for spec in rest if "mask" in spec.name.lower() and len(spec.shape) == 2)
    positions = tuple(spec for spec in rest if "position" in spec.name.lower() and len(spec.shape) == 2)
    ids = [spec for spec in rest if spec not in masks and spec not in positions]
    outputs = {spec.name for spec in model.outputs}
    presents = {spec.name: name for spec in pasts for name in present_names(spec.name) if name in outputs}
    logits = [spec.name for spec in model.outputs if spec.name not in presents.values()]
    known = len(ids) == 1 and np.issubdtype(ids[0].dtype, np.integer) and len(ids[0].shape) == 2
    if not pasts or not known or len(presents) != len(pasts) or len(logits) != 1:
        return None
    return CacheInterface(ids[0], positions, masks, pasts, presents, logits[0])


def is_past(spec: TensorSpec) -> bool:
    """Is it a cache of a known width and a free length?"""
    shape = spec.shape
    return (
        "past" in spec.name.lower()
        and len(shape) == 4
        and isinstance(shape[1], int)
        and isinstance(shape[2], str)
        and isinstance(shape[3], int)
    )


def cache_bytes_per_token(inputs: Sequence[TensorSpec]) -> int:
    """Bytes that the caches of one sequence grow by with each token; 0 of a model without caches."""
    sizes = [(spec.shape[1], spec.shape[3], spec.dtype.itemsize) for spec in inputs if is_past(spec)]
    return sum(int(heads) * int(width) * size for heads, width, size in sizes)


def present_names(past: str) -> Sequence[str]:
    """Names that exporters give to the output that continues a cache."""
    return tuple(past.replace(word, "present") for word in ("past_key_values", "past_key_value", "past"))


def cached_decoding_error(interface: CacheInterface, run: RunFunction) -> float | None:
    """The largest difference of the logits of the last tokens, read one by one through the caches or all at once,
    relative to their root mean square. None where the model does not run so."""
    ids = np.random.default_rng(0).integers(0, ID_LIMIT, (1, PROMPT + STEPS)).astype(interface.ids.dtype)
    try:
        whole = run(interface.feeds(ids, 0, interface.empty_caches()))[interface.logits]
        outputs = run(interface.feeds(ids[:, :PROMPT], 0, interface.empty_caches()))
        found = []
        for at in range(PROMPT, PROMPT + STEPS):
            caches = {past: outputs[present] for past, present in interface.presents.items()}
            outputs = run(interface.feeds(ids[:, at : at + 1], at, caches))
            found.append(outputs[interface.logits][:, -1])
    except UserError:  # fixed lengths, or ids out of the vocabulary
        return None
    if whole.ndim != 3 or whole.shape[1] != PROMPT + STEPS:
        return None
    expected = whole[:, PROMPT:].astype(np.float64)
    scale = max(float(np.sqrt(np.mean(expected**2))), 1e-30)
    return float(np.abs(np.stack(found, axis=1) - expected).max()) / scale
