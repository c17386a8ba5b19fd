"""Token reduction: fewer tokens from some block on, as a rewrite of the graph.

    plan text -parse_steps-> steps -open_tokens-> graph that is told which tokens go -close_tokens-> graph that decides

``TokenPoint``s (``passes.tokens``) say where it is possible, methods (``tokens.methods``) how.

Files
  any_length       Merging where the graph computes the number of tokens, for inputs of any length.
  close            Embedded decisions: nodes that score the tokens by attention and decide which are removed.
  cost             MACs as a function of the token counts, without building the graph: the cost model of the schedule
                   search.
  dynamic_lengths  Dynamic numbers of tokens: inputs of any length, and methods that decide by content how many tokens
                   stay.
  inplace_oracle   The oracle of token reduction: the same reduction in the graph at full length.
  methods          Methods of token reduction.
  offer            Token schedules that need no data: offered where the tokens of a model can be merged.
  open             Token reduction as a graph rewrite, with the decisions as graph inputs.
  protected        Tokens that always stay but are not the first ones: moved to the front of a stream before it is
                   reduced, and back.
  reduction        Token reduction by a specification such as ``merge:13@1-11``: parsed, checked, and applied to the
                   analyzed graph.
  step             One step of a token reduction.
  writer           New nodes of token reduction: standard operators of opset 13 on [B, N, D] streams.
"""

from __future__ import annotations

from snpc.tokens.cost import TokenCost, token_cost
from snpc.tokens.inplace_oracle import full_length_oracle, oracle_feeds, replay_decisions, token_membership
from snpc.tokens.methods import TOKEN_METHODS, Energy, TokenMethod, token_method
from snpc.tokens.offer import TokenOffer, offer_tokens
from snpc.tokens.open import externalize_decisions, stream_dtype
from snpc.tokens.reduction import (
    TokenAmount,
    TokenReductionPlan,
    TokenRequest,
    analyze_with_steps,
    check_method,
    clamped_removals,
    exit_blocks,
    parse_token_request,
    reduce_tokens,
    reduction_obstacle,
    settings_for,
    steps_for,
)
from snpc.tokens.step import TokenStep, Unmerge, UnmergeForm

__all__ = [
    "TOKEN_METHODS",
    "Energy",
    "TokenAmount",
    "TokenCost",
    "TokenMethod",
    "TokenOffer",
    "TokenReductionPlan",
    "TokenRequest",
    "TokenStep",
    "Unmerge",
    "UnmergeForm",
    "analyze_with_steps",
    "check_method",
    "clamped_removals",
    "exit_blocks",
    "externalize_decisions",
    "full_length_oracle",
    "offer_tokens",
    "oracle_feeds",
    "parse_token_request",
    "reduce_tokens",
    "reduction_obstacle",
    "replay_decisions",
    "settings_for",
    "steps_for",
    "stream_dtype",
    "token_cost",
    "token_membership",
    "token_method",
]
