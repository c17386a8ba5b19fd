"""Token schedules that need no data: offered where the tokens of a model can be merged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from snpc.graph import choose_dim_sizes
from snpc.passes import Analysis
from snpc.passes.token_analysis import TokenPoint
from snpc.tokens.cost import token_cost
from snpc.tokens.methods import TOKEN_METHODS
from snpc.tokens.reduction import TokenAmount, exit_blocks, settings_for
from snpc.tokens.step import Unmerge

OFFERED_DEPTH = (0.25, 0.75)  # tokens go between these shares of the depth: early ones cost most, late ones save little
OFFERED_REMOVAL = 0.7  # of the tokens, at most this share goes in all ...
OFFERED_STEP = 0.12  # ... and at most this share of them behind each block


@dataclass(frozen=True)
class TokenOffer:
    """A schedule for ``--tokens``, and the share of the model's MACs that it saves, unused rows included."""

    spec: str
    saved: float


def offer_tokens(analysis: Analysis) -> TokenOffer | None:
    """A schedule that merges tokens by what the graph itself computes; None where tokens cannot be merged.

    On ViT-Tiny (ImageNet), 197 tokens, it is guided:20@3-9, which changes 3 of 100 answers and no accuracy
    (docs/design-notes.md).
    """
    points, depth = analysis.tokens.points, analysis.tokens.blocks
    first, last = (round(share * depth) for share in OFFERED_DEPTH)
    chosen = [p for p in points if max(first, 1) <= p.block <= last and can_merge(p)]
    if not chosen or analysis.reduction is not None:
        return None
    count = chosen[0].count
    spans = Counter(p.exits[-1].block if p.exits else 0 for p in chosen)
    removed = round(count * min(OFFERED_REMOVAL / max(spans.values()), OFFERED_STEP))
    if removed < 1:
        return None
    name = "guided" if all(p.scores is not None for p in chosen) else "merge"
    method = TOKEN_METHODS[name]
    cost = token_cost(analysis, choose_dim_sizes(analysis.model.graph)[1])
    request = {
        p.block: (method, TokenAmount(removed, unmerge=Unmerge(p.exits[-1].block) if p.exits else None)) for p in chosen
    }
    macs = cost.macs(settings_for(points, request, count=cost.count), method, exit_blocks(request))
    return TokenOffer(f"{name}:{removed}@{blocks_text([p.block for p in chosen])}", 1 - macs / analysis.cost.macs)


def can_merge(point: TokenPoint) -> bool:
    return point.fixed_length and not point.side_input


def blocks_text(blocks: list[int]) -> str:
    """``3-9``, or ``3,5,6`` where blocks are missing."""
    if blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
    return ",".join(map(str, blocks))
