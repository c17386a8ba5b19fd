"""Token reduction: fewer tokens from some block on, as a rewrite of the graph.

    plan text -parse_steps-> steps -open_tokens-> graph that is told which tokens go -close_tokens-> graph that decides

``TokenPoint``s (``passes.tokens``) say where it is possible, methods (``tokens.methods``) how.
"""

from __future__ import annotations

from snpc.tokens.methods import TOKEN_METHODS, token_method

__all__ = ["TOKEN_METHODS", "token_method"]
