"""Token analysis: follows the token axis through the graph and finds where tokens can be reduced.

Files
  attention_scores  Attention scores: the weights of the attention in front of a reduction point.
  constant_tokens   Constant tokens: class, register, distillation and detection tokens, learned and concatenated to the
                    sequence.
  padding_sources   Token streams, and the attention masks that tell padded tokens of a stream from others.
  points            Token points: values of the residual stream where tokens can get fewer, and where all are back.
  propagate         Token propagation: follows a token axis from one value through all nodes that depend on it.
  reduction_points  Reduction points: the blocks after which tokens can be dropped or merged, and why not after the
                    others.
  side_inputs       Side inputs: tensors with one entry per token that are not computed from the token stream.
  spans             Spans: stretches of blocks in which tokens can be merged where all have to be back behind.
  state             State of token analysis: token axes of values, and what was recorded while the tokens were followed.
"""

from __future__ import annotations

from snpc.passes.token_analysis.constant_tokens import TokenRange
from snpc.passes.token_analysis.padding_sources import PaddingSource, TokenStreams, find_token_streams, shortest_period
from snpc.passes.token_analysis.points import NO_TOKENS, TokenExit, TokenFacts, TokenPoint
from snpc.passes.token_analysis.reduction_points import TokenReduction, find_reduction_points
from snpc.passes.token_analysis.state import TOKEN_AXIS, TokenAxes, TokenFlow, TokenReduce

__all__ = [
    "NO_TOKENS",
    "TOKEN_AXIS",
    "PaddingSource",
    "TokenAxes",
    "TokenExit",
    "TokenFacts",
    "TokenFlow",
    "TokenPoint",
    "TokenRange",
    "TokenReduce",
    "TokenReduction",
    "TokenStreams",
    "find_reduction_points",
    "find_token_streams",
    "shortest_period",
]
