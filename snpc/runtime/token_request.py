"""What --tokens asks for, carried out: by hand or chosen."""

from __future__ import annotations

from snpc.passes.analyze import Analysis
from snpc.runtime.calibration import Calibration
from snpc.runtime.relevance import token_relevance
from snpc.runtime.token_plan import Trials, Widths, choose_tokens
from snpc.runtime.tokens import told
from snpc.tokens.reduce import needs_offline, reduce_tokens

AUTO = "auto"


def with_tokens(
    analysis: Analysis,
    calibration: Calibration | None,
    tokens: str | None,
    *,
    target: str | None = None,
    widths: Widths | None = None,
    provider: str = "cpu",
    trials: Trials | None = None,
) -> tuple[Analysis, Calibration | None]:
    """The analysis with its tokens reduced as ``tokens`` asks ("merge:13@1-6", "auto", None: not at all), and
    calibration data as it takes them. ``target``, ``widths`` and ``trials``: see ``choose_tokens``."""
    if tokens is None:
        return analysis, calibration
    if tokens.strip() == AUTO:
        analysis = choose_tokens(analysis, calibration, target, widths, provider, trials)
    else:
        offline = None
        if calibration is not None and needs_offline(tokens):
            points = analysis.tokens.points
            offline = token_relevance(analysis.model.graph, points, calibration.batches(), provider)
        analysis = reduce_tokens(analysis, tokens, offline)
    return analysis, told(analysis, calibration, provider)
