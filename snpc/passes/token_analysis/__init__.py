"""Token analysis: follows the token axis through the graph and finds where tokens can be reduced.

Files
  padding_sources   Token streams, and the attention masks that tell padded tokens of a stream from others.
  propagate         Token propagation: follows a token axis from one value through all nodes that depend on it.
  reduction_points  Reduction points: the blocks after which tokens can be dropped or merged, and why not after the
                    others.
  side_inputs       Side inputs: tensors with one entry per token that are not computed from the token stream.
  state             State of token analysis: token axes of values, and what was recorded while the tokens were followed.
"""

from __future__ import annotations

from snpc.passes.token_analysis.padding_sources import PaddingSource, TokenStreams, find_token_streams, shortest_period
from snpc.passes.token_analysis.reduction_points import (
    NO_TOKENS,
    TOKEN_AXIS,
    TokenFacts,
    TokenPoint,
    TokenReduction,
    find_reduction_points,
)
from snpc.passes.token_analysis.state import TokenAxes, TokenFlow, TokenReduce

__all__ = [
    "NO_TOKENS",
    "TOKEN_AXIS",
    "PaddingSource",
    "TokenAxes",
    "TokenFacts",
    "TokenFlow",
    "TokenPoint",
    "TokenReduce",
    "TokenReduction",
    "TokenStreams",
    "find_reduction_points",
    "find_token_streams",
    "shortest_period",
]
