"""What --tokens asks for, carried out: by hand or chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.graph.shapes import best_binding
from snpc.passes.analyze import Analysis
from snpc.pipeline.token_decisions import decided_by, tokens_in, told
from snpc.pipeline.token_schedule import Trials, Widths, choose_tokens
from snpc.runtime.calibration import Calibration
from snpc.runtime.statistics.token_relevance import token_relevance
from snpc.tokens.inplace_oracle import walked
from snpc.tokens.open import open_tokens, stream_dtype
from snpc.tokens.reduction import Reduction, parse_wanted, reduce_tokens, steps_for
from snpc.tokens.step import Step

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
        analysis = reduce_tokens(analysis, tokens, measured(analysis, calibration, tokens, provider))
    return analysis, told(analysis, calibration, provider)


def measured(
    analysis: Analysis, calibration: Calibration | None, tokens: str, provider: str = "cpu"
) -> dict[int, tuple[float, ...]]:
    """By block what the methods that ``tokens`` names need of calibration data: the relevance of every position, or
    which share of the tokens stays on average. Empty without data."""
    wanted = parse_wanted(analysis, tokens)
    if calibration is None:
        return {}
    points, found = analysis.tokens.points, dict[int, tuple[float, ...]]()
    if any(made.offline and not made.adapts for made, _ in wanted.values()):
        found |= token_relevance(analysis.model.graph, points, calibration.batches(), provider)
    adaptive = [block for block, (made, much) in wanted.items() if made.adapts and much.share != 1]
    if adaptive:
        found |= dict.fromkeys(adaptive, (1.0,))
        found |= kept_shares(analysis, steps_for(analysis, wanted, found), calibration, provider)
    return found


def kept_shares(
    analysis: Analysis, steps: Sequence[Step], calibration: Calibration, provider: str
) -> dict[int, tuple[float, ...]]:
    """By block the share of the tokens there that stays of a sample on average, leading ones left out; what others in
    its batch keep does not count."""
    binding, facts = best_binding(analysis.model.graph)
    model = open_tokens(analysis.model.graph, facts, binding, steps)
    dtypes = {s.point.value: stream_dtype(facts, s.point) for s in steps}
    Reduction(tuple(steps), dtypes).close(model)
    names = [name for step in steps for name in step.names]
    totals = np.zeros((len(steps), 2))
    for feeds, decided in zip(calibration.batches(), decided_by(model, names, calibration, provider), strict=True):
        first = tokens_in(analysis.model.graph, steps[0].point, feeds)
        before = np.full(len(next(iter(decided.values()))), first)
        for k, (step, (_, _, sizes)) in enumerate(zip(steps, walked(steps, decided, first), strict=True)):
            after = (sizes > 0).sum(1)
            totals[k] += (before - step.setting.leading).sum(), (after - step.setting.leading).sum()
            before = after
    return {s.point.block: (float(b / a),) for s, (a, b) in zip(steps, totals, strict=True) if s.method.adapts}
