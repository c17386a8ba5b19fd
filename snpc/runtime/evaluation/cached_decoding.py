"""Decoding through caches: token by token it must give what all tokens at once give.

Sliced against masked says that one run is right. A cache leaves the model and comes back in the next run, or in that of
a second decoder, which goes on from the caches of the first; whether that still fits together is seen by doing it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from snpc.errors import UserError
from snpc.graph import DecoderInput, decoder_input, find_presents, is_cache_name
from snpc.runtime.execution import RunFunction
from snpc.types import AnyArray, Feeds, Model, TensorSpec

PROMPT, STEPS = 6, 2  # tokens that are read at once, and tokens behind them that are read one by one
ID_LIMIT = 16  # ids are drawn below it
ENCODER_LENGTH = 7  # of encoder states, where it is free


@dataclass(frozen=True)
class DecoderInterface:
    """Inputs and outputs of a decoder. ``ids`` [batch, tokens]; ``positions`` the same, or [tokens]; ``masks`` [batch,
    past + tokens]. ``states`` [batch, frames, width] of an encoder, and their ``state_masks`` [batch, frames].
    ``pasts`` [batch, heads, past, width]. ``outputs``: the ``logits`` and all others."""

    ids: TensorSpec
    positions: tuple[TensorSpec, ...]
    masks: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    state_masks: tuple[TensorSpec, ...]
    pasts: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    logits: str

    def continues(self, first: DecoderInterface) -> bool:
        """Does it take caches, and are all of them outputs of ``first``?"""
        pasts = [spec.name for spec in self.pasts]
        return bool(pasts) and len(find_presents(pasts, first.outputs)) == len(pasts)

    def caches_of(self, first: DecoderInterface, outputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The caches to go on with from the ``outputs`` of ``first``."""
        handed = find_presents([spec.name for spec in self.pasts], first.outputs)
        return {past: outputs[present] for past, present in handed.items()}

    def feeds(self, ids: AnyArray, start: int, caches: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """The inputs for ``ids`` [1, tokens] behind ``start`` tokens in ``caches``."""
        count = ids.shape[1]
        counted = np.arange(start, start + count)
        positions = {s.name: (counted if len(s.shape) == 1 else counted[None]).astype(s.dtype) for s in self.positions}
        masks = {spec.name: np.ones((1, start + count), spec.dtype) for spec in self.masks}
        return {self.ids.name: ids.astype(self.ids.dtype), **positions, **masks, **self.encoder_feeds(), **caches}

    def encoder_feeds(self) -> dict[str, AnyArray]:
        """Random states of an encoder, the same at every call, with a mask that shows them all."""
        rng = np.random.default_rng(1)
        states = {
            spec.name: rng.standard_normal([1, *map(encoder_size, spec.shape[1:])]).astype(spec.dtype)
            for spec in self.states
        }
        masks = {s.name: np.ones([1, *map(encoder_size, s.shape[1:])], s.dtype) for s in self.state_masks}
        return {**states, **masks}

    def empty_caches(self) -> dict[str, AnyArray]:
        return {
            spec.name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype)  # type: ignore[arg-type]
            for spec in self.pasts
        }


@dataclass(frozen=True)
class RunningDecoder:
    """A decoder that runs. ``states``: of its encoder, and their mask, by input; random ones where there are none."""

    interface: DecoderInterface
    run: RunFunction
    states: Feeds = field(default_factory=dict)

    def feeds(self, ids: AnyArray, start: int, caches: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """See ``DecoderInterface.feeds``."""
        made = self.interface.feeds(ids, start, caches)
        return {**made, **{name: array for name, array in self.states.items() if name in made}}


def encoder_size(dim: int | str) -> int:
    return dim if isinstance(dim, int) else ENCODER_LENGTH


def decoder_interface(model: Model) -> DecoderInterface | None:
    """By names and shapes; None where an input is of no known kind, or there is no one output beside the caches."""
    pasts = tuple(spec for spec in model.inputs if is_past(spec))
    states = of_kind(model, "encoder_states", (3,))
    state_masks = of_kind(model, "encoder_mask", (2,))
    masks = of_kind(model, "mask", (2,))
    positions = of_kind(model, "positions", (1, 2))
    known_inputs = (*pasts, *states, *state_masks, *masks, *positions)
    ids = [spec for spec in model.inputs if spec not in known_inputs]
    outputs = tuple(spec.name for spec in model.outputs)
    logits = [name for name in outputs if "present" not in name.lower()]
    known = len(ids) == 1 and np.issubdtype(ids[0].dtype, np.integer) and len(ids[0].shape) == 2
    if not known or len(logits) != 1:
        return None
    return DecoderInterface(ids[0], positions, masks, states, state_masks, pasts, outputs, logits[0])


def of_kind(model: Model, kind: DecoderInput, ranks: Collection[int]) -> tuple[TensorSpec, ...]:
    """Inputs that are of this kind by their names, and have as many axes."""
    return tuple(spec for spec in model.inputs if decoder_input(spec.name) == kind and len(spec.shape) in ranks)


def cache_interface(model: Model) -> DecoderInterface | None:
    """Of a decoder that continues every cache that it takes; None for any other model."""
    found = decoder_interface(model)
    return found if found is not None and found.continues(found) else None


def is_past(spec: TensorSpec) -> bool:
    """Is it a cache of a known width and a free length?"""
    shape = spec.shape
    return (
        is_cache_name(spec.name)
        and len(shape) == 4
        and isinstance(shape[1], int)
        and isinstance(shape[2], str)
        and isinstance(shape[3], int)
    )


def grows(spec: TensorSpec) -> bool:
    """Is it a cache that gets longer with each token?"""
    return is_past(spec) and decoder_input(spec.name) == "cache"


def cache_bytes_per_token(inputs: Sequence[TensorSpec]) -> int:
    """Bytes that the caches of one sequence grow by with each token; 0 of a model without caches."""
    sizes = [(spec.shape[1], spec.shape[3], spec.dtype.itemsize) for spec in inputs if grows(spec)]
    return sum(int(heads) * int(width) * size for heads, width, size in sizes)


def cached_decoding_error(first: RunningDecoder, second: RunningDecoder) -> float | None:
    """The largest difference of the logits of the last tokens, read one by one by ``second`` through the caches of
    ``first``, which may be the same, or all at once by ``first``, relative to their root mean square. None where the
    models do not run so."""
    ids = np.random.default_rng(0).integers(0, ID_LIMIT, (1, PROMPT + STEPS))
    start, step = first.interface, second.interface
    try:
        whole = first.run(first.feeds(ids, 0, start.empty_caches()))[start.logits]
        outputs = first.run(first.feeds(ids[:, :PROMPT], 0, start.empty_caches()))
        caches = step.caches_of(start, outputs)
        found = []
        for at in range(PROMPT, PROMPT + STEPS):
            outputs = second.run(second.feeds(ids[:, at : at + 1], at, caches))
            caches |= step.caches_of(step, outputs)
            found.append(outputs[step.logits][:, -1])
    except UserError:  # fixed lengths, or ids out of the vocabulary
        return None
    if whole.ndim != 3 or whole.shape[1] != PROMPT + STEPS:
        return None
    expected = whole[:, PROMPT:].astype(np.float64)
    scale = max(float(np.sqrt(np.mean(expected**2))), 1e-30)
    return float(np.abs(np.stack(found, axis=1) - expected).max()) / scale


def likelihood_gap(decoder: RunningDecoder, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """How far the tokens behind ``prompt`` are from the most likely ones, given those before them: the largest
    difference of their logits, relative to the root mean square of all. 0 for greedy decoding."""
    interface = decoder.interface
    ids = np.array([[*prompt, *tokens]])
    logits = decoder.run(interface.feeds(ids, 0, interface.empty_caches()))[interface.logits][0].astype(np.float64)
    rows = logits[len(prompt) - 1 : -1]
    gaps = rows.max(-1) - rows[np.arange(len(tokens)), list(tokens)]
    return float(gaps.max(initial=0)) / max(float(np.sqrt(np.mean(rows**2))), 1e-30)
