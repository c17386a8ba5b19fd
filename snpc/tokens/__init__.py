"""Token reduction: fewer tokens from some block on, as a rewrite of the graph.

    plan text -parse_steps-> steps -open_tokens-> graph that is told which tokens go -close_tokens-> graph that decides

``TokenPoint``s (``passes.tokens``) say where it is possible, methods (``tokens.methods``) how.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from snpc.errors import UserError
from snpc.tokens.methods import Adaptive, Fuse, Guided, Merge, Star, TokenMethod, TopK

TOKEN_METHODS: Mapping[str, TokenMethod] = MappingProxyType(
    {m.name: m for m in (TopK(), Fuse(), Merge(), Guided(), Star(), Adaptive())}
)


def token_method(name: str) -> TokenMethod:
    """Raises UserError that lists what exists."""
    if name not in TOKEN_METHODS:
        raise UserError(f"--tokens: there is no method {name!r}: choose one of {', '.join(TOKEN_METHODS)}, or auto")
    return TOKEN_METHODS[name]
