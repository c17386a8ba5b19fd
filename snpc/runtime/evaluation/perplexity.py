"""Perplexity of a language model: how well its logits predict the next token of held-out text.

The perplexity is the exponential of the mean negative log-likelihood in nats. The logits at a token predict the next
one. Tokens behind padding, and padding itself, do not count, on either side; nor does the first token of a sample,
which nothing predicts. An output is one of a language model where it has a row of logits over the vocabulary for every
token, and no row depends on later tokens; the original is run once more to see that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from snpc.graph import is_cache_name
from snpc.runtime.calibration import find_ids, find_mask
from snpc.runtime.evaluation.distances import Domain, log_probabilities
from snpc.runtime.execution import RunFunction
from snpc.types import AnyArray, BoolArray, Feeds, FloatArray, IntArray, Model, Perplexity, TensorSpec

CHUNK_BYTES = 32 << 20  # of log-probabilities in float64 that are held at once
CAUSAL_TOLERANCE = 1e-2  # by how much earlier logits may move, as a share of the change at the token that is another


@dataclass(frozen=True)
class Surprise:
    """Negative log-likelihood of the tokens that were predicted. ``samples``: of each (nats, tokens), sums over it."""

    samples: tuple[tuple[float, int], ...] = ()

    def __add__(self, other: Surprise) -> Surprise:
        return Surprise(self.samples + other.samples)

    @property
    def nats(self) -> float:
        return sum(nats for nats, _ in self.samples)

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.samples)

    @property
    def perplexity(self) -> float:
        """Infinite where a token was impossible; NaN without tokens."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nats / self.tokens)) if self.tokens else float("nan")


def compare_surprise(before: Surprise, after: Surprise) -> Perplexity:
    """Of two models on the same samples. The error of the factor is that of a ratio of means over samples, which the
    difference of both models has: what a text is harder by, both find hard."""
    growth = np.array([b - a for (a, _), (b, _) in zip(before.samples, after.samples, strict=True)])
    tokens = np.array([count for _, count in after.samples], np.float64)
    found = Perplexity(before.perplexity, after.perplexity, after.tokens)
    count = int((tokens > 0).sum())
    if count < 2 or not np.isfinite(growth).all():
        return found
    residuals = growth - tokens * growth.sum() / tokens.sum()
    error = np.sqrt(np.sum(residuals**2) * count / (count - 1)) / tokens.sum()
    return replace(found, error=float(found.factor * error))


@dataclass(frozen=True)
class LanguageHead:
    """Output ``logits`` [batch, tokens, vocabulary] that predicts the next of the ids [batch, tokens] in input ``ids``.
    ``mask``: the input that is 0 at padding. ``domain``: what the output's values are."""

    logits: str
    ids: str
    mask: str | None
    domain: Domain = "logits"

    def surprise(self, feeds: Feeds, outputs: Mapping[str, AnyArray]) -> Surprise:
        """Of one batch. Only a chunk of rows is ever held as log-probabilities."""
        ids, logits = feeds[self.ids], outputs[self.logits]
        predicted = self.predicted(feeds)
        sample, token = np.nonzero(predicted)
        nats, rows = np.zeros(len(ids)), max(1, CHUNK_BYTES // (8 * logits.shape[-1]))
        for start in range(0, len(sample), rows):
            s, t = sample[start : start + rows], token[start : start + rows]
            scores = logits[s, t].astype(np.float64)
            likelihoods = log_probabilities(self.domain, scores, np.isfinite(scores))
            np.add.at(nats, s, -likelihoods[np.arange(len(s)), ids[s, t + 1]])
        return Surprise(tuple(zip(nats.tolist(), predicted.sum(1).tolist(), strict=True)))

    def predicted(self, feeds: Feeds) -> BoolArray:
        """[batch, tokens - 1]: is the next token visible, and this one too?"""
        shown = self.shown(feeds)
        return np.asarray(shown[:, :-1] & shown[:, 1:])

    def shown(self, feeds: Feeds) -> BoolArray:
        """[batch, tokens]: no padding. A mask may begin with the tokens of a cache."""
        ids = feeds[self.ids]
        if self.mask is None:
            return np.ones(ids.shape, bool)
        return np.asarray(feeds[self.mask][:, -ids.shape[1] :] != 0)


@dataclass(frozen=True)
class LanguageJudge:
    """How a causal language model is judged. ``dense``: the surprise of the original, on the batches whose outputs are
    compared and on the ``rest``, whose outputs would take too much memory."""

    head: LanguageHead
    dense: Surprise
    rest: Sequence[Feeds] = ()


def sum_surprise(head: LanguageHead, feeds: Sequence[Feeds], outputs: Sequence[Mapping[str, AnyArray]]) -> Surprise:
    """Of several batches."""
    return sum((head.surprise(fed, made) for fed, made in zip(feeds, outputs, strict=True)), Surprise())


def find_language_head(
    model: Model, rows: Mapping[str, int], run: RunFunction, feeds: Feeds, outputs: Mapping[str, AnyArray]
) -> LanguageHead | None:
    """The head of a causal language model; None where the model is something else.

    ``rows``: embedding rows by name of the input of ids. ``outputs``: what the original makes of ``feeds``; it is run
    on changed ids too.
    """
    decodes = any(is_cache_name(spec.name) for spec in model.inputs)  # what is read from a cache saw no later token
    for ids, mask in predicted_ids(model.inputs):
        if ids not in feeds:
            continue
        vocabulary = max(int(feeds[ids].max(initial=0)) + 1, rows.get(ids, 0))
        for spec in sorted(model.outputs, key=lambda spec: spec.name != "logits"):
            head = LanguageHead(spec.name, ids, mask)
            if not has_logits(spec, outputs[spec.name], feeds[ids], vocabulary):
                continue
            if decodes or is_causal(head, run, feeds, outputs):
                return head
    return None


def predicted_ids(inputs: Sequence[TensorSpec]) -> list[tuple[str, str | None]]:
    """Inputs whose ids the logits may predict, each with its mask: of an encoder and decoder in one file, those of the
    decoder first, all of which count where it takes no mask."""
    decoder = find_decoder_ids(inputs)
    ids, mask = find_ids(inputs), find_mask(inputs)
    found = [decoder] if decoder is not None else []
    return found + ([(ids.name, mask.name if mask is not None else None)] if ids is not None else [])


def find_decoder_ids(inputs: Sequence[TensorSpec]) -> tuple[str, str | None] | None:
    """The ids that the decoder of an encoder and decoder reads, and their mask."""
    names = {spec.name for spec in inputs if len(spec.shape) == 2 and spec.dtype.kind in "iub"}
    if "decoder_input_ids" not in names:
        return None
    return "decoder_input_ids", "decoder_attention_mask" if "decoder_attention_mask" in names else None


def has_logits(spec: TensorSpec, output: AnyArray, ids: AnyArray, vocabulary: int) -> bool:
    """Is there a row over the vocabulary for every token?"""
    is_float = spec.dtype.kind == "f" or spec.dtype.name == "bfloat16"
    return is_float and output.ndim == 3 and output.shape[:2] == ids.shape and output.shape[2] >= vocabulary


def is_causal(head: LanguageHead, run: RunFunction, feeds: Feeds, outputs: Mapping[str, AnyArray]) -> bool:
    """Does another last token of every sample change its own logits, and none before it?

    False where no sample has two tokens.
    """
    ids, shown = feeds[head.ids], head.shown(feeds)
    samples, last = np.arange(len(ids)), last_shown(shown)
    changed = ids.copy()
    changed[samples, last] = np.where(ids[samples, last] > 0, ids[samples, last] - 1, 1)
    other = run({**feeds, head.ids: changed})[head.logits]
    moved = np.stack([largest_changes(a, b) for a, b in zip(outputs[head.logits], other, strict=True)])
    earlier = shown & (np.arange(ids.shape[1]) < last[:, None])
    own = float(moved[samples, last].max())
    return bool(earlier.any() and own > 0 and moved[earlier].max() <= CAUSAL_TOLERANCE * own)


def largest_changes(before: AnyArray, after: AnyArray) -> FloatArray:
    """[tokens, vocabulary] each -> [tokens]: the largest change of what is finite in both."""
    x, y = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    return np.asarray(np.abs(np.where(finite, x, 0.0) - np.where(finite, y, 0.0)).max(-1))


def last_shown(shown: BoolArray) -> IntArray:
    """[batch]: position of the last token that is no padding; 0 without one."""
    return np.where(shown.any(1), shown.shape[1] - 1 - shown[:, ::-1].argmax(1), 0)
