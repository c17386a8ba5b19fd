"""Methods of token reduction. Each is a small class; ``TOKEN_METHODS`` lists them.

A method works in two halves, so that what it decides can be looked at, compared and fed from outside: ``decide`` makes
*decisions*, small tensors per sample, from what the graph holds at the point, and ``reduce`` carries them out. All that
the rest of the program needs of the decisions is the matrix that ``matrix`` makes of them in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.ops import (
    ADD,
    ARG_MAX,
    CONCAT,
    CUMSUM,
    DIV,
    ELU,
    EQUAL,
    LESS,
    LOG,
    LP_NORMALIZATION,
    MAX,
    MUL,
    REDUCE_MAX,
    SCATTER_ELEMENTS,
    SUB,
    TOPK,
)
from snpc.passes.token_analysis import TokenRange
from snpc.tokens.any_length import any_length_assignment, every_second, merged_into, split_at, targets
from snpc.tokens.writer import TokenGraphBuilder
from snpc.types import AnyArray, FloatArray

ONLINE_WEIGHT = 0.4  # weight of a block's own scores where they are blended with offline scores


@dataclass(frozen=True)
class StepSettings:
    """One reduction: of ``count`` tokens the ``leading`` ones stay, and ``removed`` of the others are removed.

    ``share``: the number is not fixed but computed in the graph, from this share of the tokens or of their scores that
    is kept; ``count`` and ``removed`` are then those of one input. ``depth``: share of the model's attentions in front.
    ``protected``: ranges of tokens that stay too, and lie behind the leading ones in the stream; the step first moves
    them to the end of the leading ones, and counts them as such.
    """

    count: int
    leading: int
    removed: int
    share: float | None = None
    depth: float = 0.0
    protected: tuple[TokenRange, ...] = ()

    @property
    def others(self) -> int:
        return self.count - self.leading


@dataclass(frozen=True)
class TokenStream:
    """A stream [B, N, D], and the number of original tokens that each token stands for, [B, N, 1] (None: one each)."""

    values: ir.Value
    sizes: ir.Value | None = None


@dataclass(frozen=True)
class DecisionTensor:
    """One tensor of a decision, [batch, *shape]; a name in ``shape`` is a dynamic size."""

    name: str
    shape: tuple[int | str, ...]
    integer: bool = True


KEPT_SIZE = "kept"  # names of dynamic sizes: the number of tokens that are kept,
EVEN_SIZE, MERGED_SIZE = "even", "merged"  # that of tokens in even places, and of those that are merged into others


class TokenMethod(Protocol):
    """A method of token reduction.

    ``needs_scores``: it reads the attention weights of the block. ``weights_tokens``: a token that comes out has a
    weight, as it stands for several tokens or for none. ``only_selects``: every token that comes out is one that went
    in. ``needs_offline``: it reads scores from calibration data (``pipeline.token_request``). ``computes_count``:
    the graph can compute the number of removed tokens. ``input_adaptive``: that number depends on the input.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool]
    weights_tokens: ClassVar[bool]
    only_selects: ClassVar[bool]
    needs_offline: ClassVar[bool]
    computes_count: ClassVar[bool]
    input_adaptive: ClassVar[bool]

    def max_removed(self, others: int) -> int:
        """The largest number of ``others`` tokens that one step can remove."""
        ...

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]: ...

    def dynamic_sizes(self, settings: StepSettings) -> Mapping[str, int]:
        """The dynamic sizes in ``decisions``, for ``settings.count`` tokens."""
        ...

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        """The tensors of ``decisions``. ``values``: [B, N, D]; ``scores``: [B, N], higher = keep; both of float."""
        ...

    def reduce(
        self, writer: TokenGraphBuilder, settings: StepSettings, tokens: TokenStream, decided: list[ir.Value]
    ) -> TokenStream: ...

    def macs(self, settings: StepSettings, width: int) -> int:
        """MACs of the method itself, per sample. ``width``: of the stream."""
        ...

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """([B, N', N]: each new token as a weighted sum of old ones; [B, N']: new sizes). ``sizes``: [B, N]."""
        ...


def best_tokens(writer: TokenGraphBuilder, settings: StepSettings, scores: ir.Value, keep: int | None) -> ir.Value:
    """Positions [B, keep] of the tokens with the highest scores, leading ones left out; ``keep`` None: by the share."""
    rest = writer.slice(scores, 1, settings.leading)
    count = writer.ints(keep) if keep is not None else add_ceil_share(writer, writer.sizes(rest, 1), settings)
    positions = writer.ops(TOPK, rest, count, outputs=2, axis=1, largest=1, sorted=1)[1]
    return writer.op(ADD, positions, writer.ints(settings.leading))


def ceil_share(others: int, share: float) -> int:
    """ceil(others * share), exact where the product is a whole number."""
    return math.ceil(others * share - 1e-9)


def add_ceil_share(writer: TokenGraphBuilder, others: ir.Value, settings: StepSettings) -> ir.Value:
    """``ceil_share`` in the graph, in integer arithmetic, [1]."""
    above, below = Fraction(str(settings.share)).as_integer_ratio()
    scaled = writer.op(ADD, writer.op(MUL, others, writer.ints(above)), writer.ints(below - 1))
    return writer.op(DIV, scaled, writer.ints(below))


def add_merged_count(writer: TokenGraphBuilder, values: ir.Value, settings: StepSettings) -> ir.Value:
    """The number of tokens of ``values`` [B, N, D] that are merged into others, [1]: at least one."""
    others = writer.op(SUB, writer.sizes(values, 1), writer.ints(settings.leading))
    return writer.op(MAX, writer.op(SUB, others, add_ceil_share(writer, others, settings)), writer.ints(1))


def blend_scores(
    writer: TokenGraphBuilder, scores: ir.Value, offline: ir.Value, weight: float = ONLINE_WEIGHT
) -> ir.Value:
    """[B, N]: the logarithm of the shares s that minimize w KL(s | a) + (1 - w) KL(s | b), where a and b are ``scores``
    and ``offline`` scores as shares: s is proportional to a^w b^(1 - w). Only its order counts."""
    parts = [
        writer.op(MUL, writer.op(LOG, value), writer.constant(np.asarray([share], np.float32)))
        for value, share in ((scores, weight), (offline, 1 - weight))
    ]
    return writer.op(ADD, *parts)


def gather_with_leading(
    writer: TokenGraphBuilder, settings: StepSettings, value: ir.Value, index: ir.Value
) -> ir.Value:
    return writer.concat(1, writer.slice(value, 1, 0, settings.leading), writer.gather_rows(value, index))


def spread_over_batch(writer: TokenGraphBuilder, value: ir.Value, numbers: AnyArray) -> ir.Value:
    """``numbers`` for every sample of ``value``, [B, len(numbers)]."""
    shape = writer.concat(0, writer.sizes(value, 0), writer.ints(len(numbers)))
    return writer.expand(writer.constant(numbers.astype(np.int64)[None]), shape)


def selection_matrix(settings: StepSettings, index: AnyArray) -> FloatArray:
    """[B, leading + k, N] of zeros and ones."""
    batch = len(index)
    front = np.broadcast_to(np.arange(settings.leading), (batch, settings.leading))
    chosen: FloatArray = np.eye(settings.count)[np.concatenate([front, index], 1)]
    return chosen


@dataclass(frozen=True)
class TopK:
    """Keeps the tokens that receive most attention from the class token, or from all tokens where there is none."""

    name: ClassVar[str] = "topk"
    needs_scores: ClassVar[bool] = True
    weights_tokens: ClassVar[bool] = False
    only_selects: ClassVar[bool] = True
    needs_offline: ClassVar[bool] = False
    computes_count: ClassVar[bool] = True
    input_adaptive: ClassVar[bool] = False

    def max_removed(self, others: int) -> int:
        return others - 1

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]:
        return (DecisionTensor("keep", (settings.others - settings.removed if settings.share is None else KEPT_SIZE,)),)

    def dynamic_sizes(self, settings: StepSettings) -> Mapping[str, int]:
        return {KEPT_SIZE: settings.others - settings.removed}

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        assert scores is not None
        return [
            best_tokens(
                writer, settings, scores, settings.others - settings.removed if settings.share is None else None
            )
        ]

    def reduce(
        self, writer: TokenGraphBuilder, settings: StepSettings, tokens: TokenStream, decided: list[ir.Value]
    ) -> TokenStream:
        sizes = gather_with_leading(writer, settings, tokens.sizes, decided[0]) if tokens.sizes is not None else None
        return TokenStream(gather_with_leading(writer, settings, tokens.values, decided[0]), sizes)

    def macs(self, settings: StepSettings, width: int) -> int:
        return 0

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        chosen = selection_matrix(settings, decided[0])
        return chosen, np.einsum("bij,bj->bi", chosen, sizes)


@dataclass(frozen=True)
class Star(TopK):
    """As topk, by the attention within the block blended with the relevance of each position for the outputs through
    the later blocks (STAR, ICLR 2024)."""

    name: ClassVar[str] = "star"
    needs_offline: ClassVar[bool] = True
    computes_count: ClassVar[bool] = False


@dataclass(frozen=True)
class Adaptive(TopK):
    """Keeps of each input as few tokens, best first, as together have a share of the scores of all (behind the leading
    ones), so that easy inputs keep fewer. In a batch all samples get as many as the one that keeps most; what a sample
    has beyond its own weighs nothing."""

    name: ClassVar[str] = "adaptive"
    weights_tokens: ClassVar[bool] = True
    needs_offline: ClassVar[bool] = True
    input_adaptive: ClassVar[bool] = True

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]:
        return (DecisionTensor("keep", (KEPT_SIZE,)), DecisionTensor("alive", (KEPT_SIZE,), integer=False))

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        assert scores is not None
        rest = writer.slice(scores, 1, settings.leading)
        ranked, where = writer.ops(TOPK, rest, writer.sizes(rest, 1), outputs=2, axis=1, largest=1, sorted=1)
        before = writer.op(CUMSUM, ranked, writer.constant(np.asarray(1, np.int64)), exclusive=1)
        share = writer.constant(np.asarray([settings.share], np.float32))
        alive = writer.op(LESS, before, writer.op(MUL, writer.reduce_sum(rest, 1, keep=True), share))
        counts = writer.reduce_sum(writer.cast(alive, ir.DataType.INT64), 1)
        most = writer.op(REDUCE_MAX, counts, keepdims=1)
        keep, alive = (writer.slice_to(value, 1, most) for value in (where, alive))
        return [writer.op(ADD, keep, writer.ints(settings.leading)), writer.cast(alive)]

    def reduce(
        self, writer: TokenGraphBuilder, settings: StepSettings, tokens: TokenStream, decided: list[ir.Value]
    ) -> TokenStream:
        keep, alive = decided
        sizes = tokens.sizes if tokens.sizes is not None else writer.ones(tokens.values)
        own = writer.op(MUL, writer.gather_rows(sizes, keep), writer.unsqueeze(alive, -1))
        front = [writer.slice(sizes, 1, 0, settings.leading)] if settings.leading else []
        return TokenStream(gather_with_leading(writer, settings, tokens.values, keep), writer.concat(1, *front, own))

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        keep, alive = decided
        chosen = selection_matrix(settings, keep)
        chosen[:, settings.leading :] *= alive[:, :, None]
        return chosen, np.einsum("bij,bj->bi", chosen, sizes)


@dataclass(frozen=True)
class Fuse:
    """As topk; the dropped tokens leave their average, weighted by the same attention (EViT, arXiv 2202.07800)."""

    name: ClassVar[str] = "fuse"
    needs_scores: ClassVar[bool] = True
    weights_tokens: ClassVar[bool] = False
    only_selects: ClassVar[bool] = False
    needs_offline: ClassVar[bool] = False
    computes_count: ClassVar[bool] = False
    input_adaptive: ClassVar[bool] = False

    def max_removed(self, others: int) -> int:
        return others - 1

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]:
        keep = settings.others - settings.removed - 1
        return (DecisionTensor("keep", (keep,)), DecisionTensor("share", (settings.count,), integer=False))

    def dynamic_sizes(self, settings: StepSettings) -> Mapping[str, int]:
        return {}

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        assert scores is not None
        keep = best_tokens(writer, settings, scores, settings.others - settings.removed - 1)
        front = writer.ints(*range(settings.leading))
        batch = writer.concat(0, writer.sizes(keep, 0), writer.ints(settings.leading))
        stays = writer.concat(1, writer.expand(writer.unsqueeze(front, 0), batch), keep)
        zeros = writer.expand(writer.constant(np.zeros(1, np.float32)), writer.sizes(stays, 0, 1))
        remaining = writer.op(SCATTER_ELEMENTS, scores, stays, zeros, axis=1)
        return [keep, writer.cast(writer.op(DIV, remaining, writer.reduce_sum(remaining, 1, keep=True)))]

    def reduce(
        self, writer: TokenGraphBuilder, settings: StepSettings, tokens: TokenStream, decided: list[ir.Value]
    ) -> TokenStream:
        keep, share = decided
        fused = writer.matmul(writer.unsqueeze(share, 1), tokens.values)
        values = writer.op(CONCAT, gather_with_leading(writer, settings, tokens.values, keep), fused, axis=1)
        if tokens.sizes is None:
            return TokenStream(values)
        one = writer.slice(writer.ones(tokens.values), 1, 0, 1)
        return TokenStream(
            values, writer.op(CONCAT, gather_with_leading(writer, settings, tokens.sizes, keep), one, axis=1)
        )

    def macs(self, settings: StepSettings, width: int) -> int:
        return settings.count * width

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        keep, share = decided
        chosen = selection_matrix(settings, keep)
        matrix = np.concatenate([chosen, share[:, None].astype(np.float64)], 1)
        kept = np.einsum("bij,bj->bi", chosen, sizes)
        return matrix, np.concatenate([kept, np.ones((len(keep), 1))], 1)


@dataclass(frozen=True)
class Merge:
    """Merges the most similar pairs: tokens in even places with tokens in odd ones, by cosine of the residual stream;
    each counts in attention for as many as it is made of (ToMe, arXiv 2210.09461, which compares keys instead)."""

    name: ClassVar[str] = "merge"
    needs_scores: ClassVar[bool] = False
    weights_tokens: ClassVar[bool] = True
    only_selects: ClassVar[bool] = False
    needs_offline: ClassVar[bool] = False
    computes_count: ClassVar[bool] = True
    input_adaptive: ClassVar[bool] = False

    def max_removed(self, others: int) -> int:
        return others // 2

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]:
        even = (settings.others + 1) // 2
        dynamic = settings.share is not None
        return (
            DecisionTensor("order", (EVEN_SIZE if dynamic else even,)),  # even tokens, by priority
            # which odd token each of the first ones is merged into
            DecisionTensor("into", (MERGED_SIZE if dynamic else settings.removed,)),
        )

    def dynamic_sizes(self, settings: StepSettings) -> Mapping[str, int]:
        return {EVEN_SIZE: (settings.others + 1) // 2, MERGED_SIZE: settings.removed}

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        unit = writer.op(LP_NORMALIZATION, values, axis=-1, p=2)
        dynamic = settings.share is not None
        even, odd = (
            every_second(writer, unit, settings.leading + k)
            if dynamic
            else writer.gather_positions(unit, range(settings.leading + k, settings.count, 2))
            for k in (0, 1)
        )
        alike = writer.matmul(even, writer.swap_last_axes(odd))
        first = self.merge_priority(writer, settings, writer.reduce_max(alike, 2), scores)
        every = writer.sizes(first, 1) if dynamic else writer.ints((settings.others + 1) // 2)
        order = writer.ops(TOPK, first, every, outputs=2, axis=1, sorted=1)[1]
        merged = add_merged_count(writer, unit, settings) if dynamic else writer.ints(settings.removed)
        rows = writer.gather_rows(alike, writer.slice_to(order, 1, merged))
        return [order, writer.op(ARG_MAX, rows, axis=2, keepdims=0)]

    def merge_priority(
        self, writer: TokenGraphBuilder, settings: StepSettings, near: ir.Value, scores: ir.Value | None
    ) -> ir.Value:
        """[B, even]: priority of each even token for being merged. ``near``: its cosine to the nearest odd token."""
        return near

    def reduce(
        self, writer: TokenGraphBuilder, settings: StepSettings, tokens: TokenStream, decided: list[ir.Value]
    ) -> TokenStream:
        order, into = decided
        source, *stay = self.split_order(writer, settings, order, into)
        rows = self.gather_targets(writer, settings, tokens.values, order)
        goes = writer.cast(self.find_targets(writer, settings, rows, into))  # [B, fixed, gone]
        if tokens.sizes is None:
            size = writer.op(ADD, writer.reduce_sum(goes, 2, keep=True), writer.ones(rows))
            others = [writer.unsqueeze(writer.cast(writer.op(EQUAL, one, one)), -1) for one in stay]
        else:
            own = self.gather_targets(writer, settings, tokens.sizes, order)
            goes = writer.op(MUL, goes, writer.swap_last_axes(writer.gather_rows(tokens.sizes, source)))
            size = writer.op(ADD, own, writer.reduce_sum(goes, 2, keep=True))
            others = [writer.gather_rows(tokens.sizes, one) for one in stay]
            rows = writer.op(MUL, rows, own)
        added = writer.matmul(goes, writer.gather_rows(tokens.values, source))
        merged = writer.op(DIV, writer.op(ADD, rows, added), size)
        values = writer.concat(1, merged, *(writer.gather_rows(tokens.values, one) for one in stay))
        return TokenStream(values, writer.concat(1, size, *others))

    def target_count(self, settings: StepSettings) -> int:
        """The number of tokens that others are merged into."""
        return settings.others // 2

    def find_targets(
        self, writer: TokenGraphBuilder, settings: StepSettings, rows: ir.Value, into: ir.Value
    ) -> ir.Value:
        """[B, fixed, merged tokens]: is each of these tokens merged into each of ``rows``, those that are fixed?"""
        if settings.share is not None:
            return merged_into(writer, rows, into, settings.leading)
        number = np.concatenate([np.full(settings.leading, -1), np.arange(self.target_count(settings))])
        places = writer.constant(number.astype(np.int64)[None, :, None])
        return writer.op(EQUAL, places, writer.unsqueeze(into, 1))

    def split_order(
        self, writer: TokenGraphBuilder, settings: StepSettings, order: ir.Value, into: ir.Value
    ) -> list[ir.Value]:
        """[positions [B, removed] of the tokens that are merged into others; of those that stay as they are, if any]"""
        staying = (settings.others + 1) // 2 - settings.removed
        where = writer.op(ADD, writer.op(MUL, order, writer.ints(2)), writer.ints(settings.leading))
        if settings.share is not None:
            return split_at(writer, where, writer.sizes(into, 1))
        return writer.split(where, 1, settings.removed, staying)

    def gather_targets(
        self, writer: TokenGraphBuilder, settings: StepSettings, value: ir.Value, order: ir.Value
    ) -> ir.Value:
        """The rows of leading tokens and of those that others are merged into."""
        if settings.share is not None:
            return targets(writer, value, settings.leading)
        fixed = [*range(settings.leading), *range(settings.leading + 1, settings.count, 2)]
        return writer.gather_positions(value, fixed)

    def assignment(
        self, writer: TokenGraphBuilder, settings: StepSettings, before: ir.Value, decided: list[ir.Value]
    ) -> ir.Value:
        """[B, N]: the position, behind the step, of what each token of ``before`` [B, N, D] became part of."""
        order, into = decided
        if settings.share is not None:
            return any_length_assignment(writer, before, order, into, settings.leading)
        fixed = settings.leading + self.target_count(settings)
        stay = np.arange(fixed, settings.count - settings.removed)
        places = [writer.op(ADD, into, writer.ints(settings.leading))]
        places += [spread_over_batch(writer, order, stay)] if len(stay) else []
        new = writer.op(SCATTER_ELEMENTS, order, order, writer.concat(1, *places), axis=1)
        even, odd = (settings.others + 1) // 2, settings.others // 2
        both = np.empty(settings.others, np.int64)
        both[::2], both[1::2] = settings.leading + odd + np.arange(even), settings.leading + np.arange(odd)
        every = writer.concat(1, spread_over_batch(writer, order, np.arange(fixed)), new)
        return writer.gather_positions(every, [*range(settings.leading), *both.tolist()])

    def macs(self, settings: StepSettings, width: int) -> int:
        even, odd = (settings.others + 1) // 2, settings.others // 2
        return even * odd * width + (settings.leading + odd) * settings.removed * width

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        order, into = decided
        source, stay = np.split(order, [into.shape[1]], axis=1)
        batch, lead = len(order), settings.leading
        odd = np.broadcast_to(np.arange(lead + 1, settings.count, 2), (batch, settings.others // 2))
        matrix = selection_matrix(settings, np.concatenate([odd, lead + 2 * stay], 1))
        matrix[np.arange(batch)[:, None], lead + into, lead + 2 * source] = 1
        matrix *= sizes[:, None, :]
        new = matrix.sum(2)
        return matrix / new[:, :, None], new


@dataclass(frozen=True)
class Guided(Merge):
    """As merge, but of equally similar tokens those that receive little attention are merged first."""

    name: ClassVar[str] = "guided"
    needs_scores: ClassVar[bool] = True
    weight: float = 0.07  # in cosine, of a factor e in attention

    def merge_priority(
        self, writer: TokenGraphBuilder, settings: StepSettings, near: ir.Value, scores: ir.Value | None
    ) -> ir.Value:
        assert scores is not None
        own = writer.op(LOG, writer.slice(scores, 1, settings.leading, step=2))
        scale = writer.constant(np.asarray([self.weight], np.float32))
        return writer.op(SUB, near, writer.op(MUL, own, scale))


@dataclass(frozen=True)
class Energy(Merge):
    """Merges tokens among those with the highest energy: which have many similar ones around them, so that what stands
    alone stays as it is (PiToMe, arXiv 2405.16148). E_i = mean_j ELU(cos(x_i, x_j) - m), m falling with depth; of the
    2r tokens of highest energy, in that order, every first is merged into the most similar of every second."""

    name: ClassVar[str] = "energy"
    computes_count: ClassVar[bool] = False
    margin: float = 0.75

    def decisions(self, settings: StepSettings) -> tuple[DecisionTensor, ...]:
        return (
            DecisionTensor("order", (settings.others,)),  # merged tokens, those that they can be merged into, the rest
            DecisionTensor("into", (settings.removed,)),  # which of the second each of the first is merged into
        )

    def decide(
        self, writer: TokenGraphBuilder, settings: StepSettings, values: ir.Value, scores: ir.Value | None
    ) -> list[ir.Value]:
        unit = writer.op(LP_NORMALIZATION, writer.slice(values, 1, settings.leading), axis=-1, p=2)
        alike = writer.matmul(unit, writer.swap_last_axes(unit))
        margin = writer.constant(np.asarray([self.margin * (1 - settings.depth)], np.float32))
        energy = writer.reduce_sum(writer.op(ELU, writer.op(SUB, alike, margin)), 2)
        ranked = writer.ops(TOPK, energy, writer.ints(settings.others), outputs=2, axis=1, sorted=1)[1]
        paired = 2 * settings.removed
        first, second = (writer.slice(ranked, 1, start, paired, 2) for start in (0, 1))
        rest = [writer.slice(ranked, 1, paired)] if paired < settings.others else []
        pairs = writer.matmul(writer.gather_rows(unit, first), writer.swap_last_axes(writer.gather_rows(unit, second)))
        return [writer.concat(1, first, second, *rest), writer.op(ARG_MAX, pairs, axis=2, keepdims=0)]

    def target_count(self, settings: StepSettings) -> int:
        return settings.removed

    def split_order(
        self, writer: TokenGraphBuilder, settings: StepSettings, order: ir.Value, into: ir.Value
    ) -> list[ir.Value]:
        where = writer.op(ADD, order, writer.ints(settings.leading))
        source = writer.slice(where, 1, 0, settings.removed)
        staying = settings.others - 2 * settings.removed
        return [source, *([writer.slice(where, 1, 2 * settings.removed)] if staying else [])]

    def gather_targets(
        self, writer: TokenGraphBuilder, settings: StepSettings, value: ir.Value, order: ir.Value
    ) -> ir.Value:
        target = writer.slice(order, 1, settings.removed, 2 * settings.removed)
        return gather_with_leading(writer, settings, value, writer.op(ADD, target, writer.ints(settings.leading)))

    def assignment(
        self, writer: TokenGraphBuilder, settings: StepSettings, before: ir.Value, decided: list[ir.Value]
    ) -> ir.Value:
        order, into = decided
        others = np.arange(settings.leading, settings.count - settings.removed)
        places = writer.concat(
            1, writer.op(ADD, into, writer.ints(settings.leading)), spread_over_batch(writer, order, others)
        )
        new = writer.op(SCATTER_ELEMENTS, order, order, places, axis=1)
        front = [spread_over_batch(writer, order, np.arange(settings.leading))] if settings.leading else []
        return writer.concat(1, *front, new)

    def macs(self, settings: StepSettings, width: int) -> int:
        others, removed = settings.others, settings.removed
        return (others**2 + removed**2 + (settings.leading + removed) * removed) * width

    def matrix(
        self, settings: StepSettings, decided: list[AnyArray], sizes: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        order, into = decided
        source, kept = np.split(order, [settings.removed], axis=1)
        matrix = selection_matrix(settings, settings.leading + kept)
        rows = np.arange(len(order))[:, None]
        matrix[rows, settings.leading + into, settings.leading + source] = 1
        matrix *= sizes[:, None, :]
        new = matrix.sum(2)
        return matrix / new[:, :, None], new


__all__ = [
    "KEPT_SIZE",
    "Adaptive",
    "DecisionTensor",
    "Energy",
    "Fuse",
    "Guided",
    "Merge",
    "Star",
    "StepSettings",
    "TokenMethod",
    "TokenStream",
    "TopK",
]


TOKEN_METHODS: Mapping[str, TokenMethod] = MappingProxyType(
    {m.name: m for m in (TopK(), Fuse(), Merge(), Guided(), Energy(), Star(), Adaptive())}
)


def token_method(name: str) -> TokenMethod:
    """Raises UserError that lists what exists."""
    if name not in TOKEN_METHODS:
        raise UserError(f"--tokens: there is no method {name!r}: choose one of {', '.join(TOKEN_METHODS)}, or auto")
    return TOKEN_METHODS[name]
