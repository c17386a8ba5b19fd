"""Token schedules that need no data: offered where the tokens of a model can get fewer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from snpc.graph import choose_dim_sizes
from snpc.passes import Analysis
from snpc.passes.token_analysis import TokenPoint
from snpc.tokens.cost import token_cost
from snpc.tokens.methods import TOKEN_METHODS, TokenMethod
from snpc.tokens.reduction import TokenAmount, exit_blocks, settings_for
from snpc.tokens.step import Unmerge

OFFERED_DEPTH = (0.25, 0.75)  # tokens go between these shares of the depth: early ones cost most, late ones save little
OFFERED_REMOVAL = 0.7  # of the tokens, at most this share goes in all ...
OFFERED_STEP = 0.12  # ... and at most this share of them behind each block
OFFERED_DIGITS = 2  # of a share


@dataclass(frozen=True)
class TokenOffer:
    """A schedule for ``--tokens``, and the share of the model's MACs that it saves, unused rows included. ``merges``:
    tokens are merged, not dropped."""

    spec: str
    saved: float
    merges: bool


def offer_tokens(analysis: Analysis) -> TokenOffer | None:
    """A schedule that decides by what the graph itself computes: tokens are merged, and where something beside the
    stream has an entry per token, such as a mask of padding, those that get little attention are dropped. None where
    neither is possible.

    On ViT-Tiny (ImageNet), 197 tokens, it is guided:20@3-9, which changes 3 of 100 answers and no accuracy
    (docs/design-notes.md).
    """
    points, depth = analysis.tokens.points, analysis.tokens.blocks
    first, last = (round(share * depth) for share in OFFERED_DEPTH)
    method, chosen = offered_method([p for p in points if max(first, 1) <= p.block <= last])
    if not chosen or analysis.reduction is not None:
        return None
    cost = token_cost(analysis, choose_dim_sizes(analysis.model.graph)[1])
    spans = Counter(p.exits[-1].block if p.exits else 0 for p in chosen)
    amount = offered_amount(chosen[0], min(OFFERED_REMOVAL / max(spans.values()), OFFERED_STEP))
    if amount is None:
        return None
    request = {
        p.block: (method, replace(amount, unmerge=Unmerge(p.exits[-1].block) if p.exits else None)) for p in chosen
    }
    macs = cost.macs(settings_for(points, request, count=cost.count), method, exit_blocks(request))
    text = amount.removed if amount.share is None else amount.share
    spec = f"{method.name}:{text}@{blocks_text([p.block for p in chosen])}"
    return TokenOffer(spec, 1 - macs / analysis.cost.macs, not method.only_selects)


def offered_method(points: Sequence[TokenPoint]) -> tuple[TokenMethod, list[TokenPoint]]:
    """The method, and the points at which it can be used."""
    merging = [p for p in points if not p.side_input]
    if merging:
        return TOKEN_METHODS["guided" if all(p.scores is not None for p in merging) else "merge"], merging
    return TOKEN_METHODS["topk"], [p for p in points if p.scores is not None and not p.exits]


def offered_amount(point: TokenPoint, step: float) -> TokenAmount | None:
    """The share ``step`` of the tokens goes behind each block; None where that is less than one token."""
    if not point.fixed_length:
        return TokenAmount(0, round(1 - step, OFFERED_DIGITS))
    removed = round(point.count * step)
    return TokenAmount(removed) if removed >= 1 else None


def blocks_text(blocks: list[int]) -> str:
    """``3-9``, or ``3,5,6`` where blocks are missing."""
    if blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
    return ",".join(map(str, blocks))
