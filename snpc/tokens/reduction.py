"""Token reduction by a specification such as ``merge:13@1-11``: parsed, checked, and applied to the analyzed graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph import choose_dim_sizes, cost_of, infer_graph, run_pass
from snpc.passes import Analysis, GraphAtSizes, SizedFacts, analyze_graph
from snpc.passes.canonicalization import FOLD_SHAPE_ARITHMETIC
from snpc.passes.token_analysis import TokenPoint
from snpc.tokens.close import embed_decisions
from snpc.tokens.dynamic_lengths import kept_count, kept_dim_sizes, resize_steps
from snpc.tokens.methods import TOKEN_METHODS, Merge, StepSettings, TokenMethod, ceil_share, token_method
from snpc.tokens.open import batch_dimension, decision_shape, externalize_decisions, stream_dtype
from snpc.tokens.step import TokenStep, Unmerge

OfflineScores = Mapping[int, Sequence[float]]
TokenRequest = Mapping[int, tuple[TokenMethod, "TokenAmount"]]
NO_SHARES: Mapping[int, float] = MappingProxyType({})
TOKENS_SYNTAX = (
    "must look like merge:13, topk:0.7@3,6,9 or merge:8@1-6+fuse:0.8@9; with merge:13@1-6/9 all tokens are back behind "
    "block 9"
)
SPEC_PART = re.compile(r"\s*(\w+):([0-9.]+)(?:@([\d,\-\s]+))?(?:/(\d+))?(?::(delta|copy))?\s*")


@dataclass(frozen=True)
class TokenReductionPlan:
    """The steps of a reduction (``Analysis.reduction``), and how to embed their decisions into a graph.

    ``quoted_steps``: the steps at the length at which MACs are quoted; empty: the same.
    """

    steps: tuple[TokenStep, ...]
    dtypes: Mapping[str, ir.DataType] = field(repr=False)
    quoted_steps: tuple[TokenStep, ...] = ()

    @property
    def spec(self) -> str:
        """The steps as text that ``reduce_tokens`` reads."""
        parts: dict[tuple[str, str], list[int]] = {}
        for step in self.steps:
            setting = step.settings
            amount = setting.removed if setting.share is None else setting.share
            parts.setdefault((f"{step.method.name}:{amount}", unmerge_text(step.unmerge)), []).append(step.point.block)
        return "+".join(f"{what}@{','.join(map(str, blocks))}{back}" for (what, back), blocks in parts.items())

    @property
    def summary(self) -> str:
        """How many tokens are left where, and by which steps."""
        steps = self.quoted_steps or self.steps
        back = ", ".join(str(block) for block in dict.fromkeys(s.unmerge.block for s in steps if s.unmerge is not None))
        behind = f", all back behind block{'s' if ',' in back else ''} {back}" if back else ""
        return f"{steps[0].settings.count} to {min(s.remaining for s in steps)} by {self.spec}{behind}"

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the decision tensors."""
        return tuple(name for step in self.steps for name in step.names)

    @property
    def decided_by(self) -> frozenset[str]:
        """Names of the values and nodes by which the steps decide: the stream at each, and its attention."""
        scores = (s.point.scores for s in self.steps if s.method.needs_scores and s.point.scores is not None)
        return frozenset([*(s.point.value for s in self.steps), *(found.fused or found.tensor for found in scores)])

    def embed_decisions(self, model: ir.Model) -> None:
        """Replace the decision inputs of ``model``, in place, by nodes that decide."""
        embed_decisions(model, self.steps, self.dtypes)

    def finalize(self, model: ir.Model) -> None:
        """Embed the decisions, and fold shape arithmetic of fixed sizes: for models that are written or timed."""
        self.embed_decisions(model)
        run_pass(FOLD_SHAPE_ARITHMETIC, model)

    def name_decision_sizes(self, model: ir.Model) -> None:
        """Set the shapes of embedded decisions, with names for the dynamic sizes."""
        shapes = {n: decision_shape(s, k, batch_dimension(model)) for s in self.steps for k, n in enumerate(s.names)}
        for value in (v for node in model.graph for v in node.outputs):
            value.shape = shapes.get(str(value.name), value.shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "steps": [
                {
                    "block": s.point.block,
                    "method": s.method.name,
                    "tokens": s.settings.count,
                    "after": s.remaining,
                    **({"back_behind": s.unmerge.block, "form": s.unmerge.form} if s.unmerge is not None else {}),
                    **({"any_length": True} if not s.point.fixed_length else {}),
                    **({"on_average": True} if s.method.input_adaptive else {}),
                    **({"offline": list(s.offline)} if s.offline else {}),
                }
                for s in self.quoted_steps or self.steps
            ],
        }


def reduce_tokens(analysis: Analysis, text: str, offline: OfflineScores | None = None) -> Analysis:
    """The analysis of the model with fewer tokens, by a specification such as ``topk:0.7@3,6,9``.

    A share is kept, a whole number is removed; blocks count from 1; without ``@`` every possible block is meant. Where
    the outputs need all tokens, ``merge:13@1-6/9`` has them back behind block 9, ``/9:copy`` as copies; without ``/``
    they are back as late as possible.
    ``offline``: block -> scores from calibration data (``pipeline.token_request.measure_offline_scores``). Raises
    UserError where the reduction is not possible. The analysis is returned unchanged where no token is removed.
    """
    return analyze_with_steps(analysis, steps_for(analysis, parse_token_request(analysis, text), offline or {}))


def analyze_with_steps(analysis: Analysis, steps: Sequence[TokenStep]) -> Analysis:
    """The analysis of the graph with the decisions of ``steps`` as inputs; MACs include those of deciding."""
    if analysis.reduction is not None:
        raise UserError("the tokens of this model are reduced already")
    if not steps:
        return analysis
    graph = analysis.model.graph
    dim_sizes, facts = choose_dim_sizes(graph)
    dtypes = {s.point.value: stream_dtype(facts, s.point) for s in steps}
    quoted_steps = resize_steps(steps, infer_graph(graph, dict(analysis.dim_sizes)))
    reduction = TokenReductionPlan(tuple(steps), dtypes, tuple(quoted_steps))
    opened = externalize_decisions(graph, facts, dim_sizes, steps)
    closed = opened.clone()
    reduction.embed_decisions(closed)
    dim_sizes = dim_sizes.extended(kept_dim_sizes(steps))
    quoted_sizes = analysis.dim_sizes.extended(kept_dim_sizes(quoted_steps))
    extra = (
        cost_of(closed, infer_graph(closed, quoted_sizes)).macs
        - cost_of(opened, infer_graph(opened, quoted_sizes)).macs
    )
    reduced = analyze_graph(
        analysis.model,
        GraphAtSizes(
            opened,
            SizedFacts(dim_sizes, infer_graph(opened, dim_sizes)),
            SizedFacts(quoted_sizes, infer_graph(opened, quoted_sizes)),
            analysis.given_sizes,
        ),
        analysis.cost,
        tokens=analysis.tokens,
        reduction=reduction,
        extra_macs=extra,
        kv_cache=analysis.traced_graph.kv_cache,
    )
    return replace(reduced, metrics=analysis.metrics)


MIN_MERGED_SHARE = 0.5  # what stays behind one block where pairs are merged
MAX_DIGITS = 9  # of a block or of a number of tokens

# -- specifications --------------------------------------------------------------------------------------------------


def parse_token_request(analysis: Analysis, text: str) -> TokenRequest:
    """Block -> method and amount. Raises UserError where ``text`` cannot be parsed or carried out."""
    request: dict[int, tuple[TokenMethod, TokenAmount]] = {}
    for part in text.split("+"):
        match = SPEC_PART.fullmatch(part)
        if match is None:
            raise UserError(f"--tokens {text!r}: {TOKENS_SYNTAX}")
        method, token_amount = token_method(match[1]), parse_amount(text, match[2])
        for block in parse_blocks(analysis, text, match[3]):
            check_method(analysis, block, method)
            check_amount(analysis, block, method, token_amount)
            if block in request:
                raise UserError(f"--tokens {text!r}: block {block} is named twice; keep one")
            request[block] = (method, replace(token_amount, unmerge=parse_unmerge(analysis, block, match[4], match[5])))
    check_spans(request)
    return request


def parse_unmerge(analysis: Analysis, block: int, back: str | None, form: str | None) -> Unmerge | None:
    """Where the tokens that are merged behind ``block`` are back, of ``/back:form``."""
    point = analysis.tokens.at(block)
    assert point is not None
    if not point.exits:
        said = (f"/{back[:20]}" if back is not None else "") + (f":{form}" if form is not None else "")
        if said:
            raise UserError(f"--tokens: no output needs all tokens, so none have to be back: leave out {said}")
        return None
    if back is not None and (len(back) > MAX_DIGITS or point.exit_at(int(back)) is None):
        last = point.exits[-1].block
        where = f"behind blocks {point.exits[0].block} to {last}" if len(point.exits) > 1 else f"behind block {last}"
        raise UserError(f"--tokens: tokens that are merged behind block {block} can be back {where}, not {back[:20]}")
    return Unmerge(int(back) if back is not None else point.exits[-1].block, "copy" if form == "copy" else "delta")


def check_spans(request: TokenRequest) -> None:
    """Raises UserError where tokens are merged again before those of another span are back."""
    back = 0
    for block in sorted(request):
        unmerge = request[block][1].unmerge
        if unmerge is None:
            continue
        if block <= back != unmerge.block:
            raise UserError(
                f"--tokens: behind block {block} other tokens are merged, which are back behind block {back}: "
                f"give /{back} there too, or merge again behind a later block"
            )
        back = unmerge.block


def exit_blocks(request: TokenRequest) -> frozenset[int]:
    """The blocks at whose end all tokens are back."""
    return frozenset(amount.unmerge.block for _, amount in request.values() if amount.unmerge is not None)


def unmerge_text(unmerge: Unmerge | None) -> str:
    """``/9`` or ``/9:copy``; empty where no tokens come back."""
    return f"/{unmerge.block}{':copy' if unmerge.form == 'copy' else ''}" if unmerge is not None else ""


@dataclass(frozen=True)
class TokenAmount:
    """``share`` of the tokens is kept; None: ``removed`` tokens are removed. ``unmerge``: where all are back."""

    removed: int
    share: float | None = None
    unmerge: Unmerge | None = None

    def removed_of(self, others: int) -> int:
        return self.removed if self.share is None else others - ceil_share(others, self.share)


def parse_amount(text: str, digits: str) -> TokenAmount:
    if digits.isdigit() and len(digits.lstrip("0")) <= MAX_DIGITS:
        return TokenAmount(int(digits))
    try:
        share = float(digits)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UserError(
            f"--tokens {text!r}: {digits} is neither a share to keep (0.7) nor a number of tokens that go (13)"
        )
    return TokenAmount(0, share)


def parse_blocks(analysis: Analysis, text: str, listed: str | None) -> list[int]:
    facts = analysis.tokens
    if not facts.points:
        raise UserError(f"{analysis.model.path.name}: its tokens cannot be reduced{reduction_obstacle(analysis)}")
    if listed is None:
        return [p.block for p in facts.points]
    listed_blocks: list[int] = []
    for item in listed.replace(" ", "").split(","):
        first, _, last = item.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"--tokens {text!r}: {TOKENS_SYNTAX}")
        listed_blocks += expand_blocks(analysis, first, last or first)
    return listed_blocks


def expand_blocks(analysis: Analysis, first: str, last: str) -> range:
    """The blocks ``first`` to ``last``, both included. UserError: the model does not have them; raised before a
    list is made of them."""
    highest = max(point.block for point in analysis.tokens.points)
    for digits in (first, last):
        if len(digits.lstrip("0")) > MAX_DIGITS or int(digits) > highest:
            raise UserError(impossible_block(analysis, digits[:20]))
    return range(int(first), int(last) + 1)


def impossible_block(analysis: Analysis, block: int | str) -> str:
    possible = ", ".join(str(p.block) for p in analysis.tokens.points)
    return f"--tokens: not after block {block} of {analysis.tokens.blocks}; it is possible after {possible}"


def reduction_obstacle(analysis: Analysis) -> str:
    pin = next(iter(analysis.tokens.pins), None)
    return f": {pin.reason} ({pin.operator})" if pin is not None else ": it has no attention over tokens"


def check_amount(analysis: Analysis, block: int, method: TokenMethod, amount: TokenAmount) -> None:
    point = analysis.tokens.at(block)
    assert point is not None
    if method.input_adaptive and amount.share is None:
        raise UserError(
            f"--tokens: {method.name} takes a share of the scores that the kept tokens have: {method.name}:0.9"
        )
    if point.fixed_length:
        return
    if not method.computes_count or amount.share is None:
        fitting = "merge and a share that stays (merge:0.9)" if point.exits else "topk and a share (topk:0.7@3,6)"
        raise UserError(f"--tokens: inputs have different numbers of tokens: give {fitting}")
    if isinstance(method, Merge) and amount.share < MIN_MERGED_SHARE:
        raise UserError(f"--tokens: {method.name} merges at most half of the tokens: give a share of 0.5 or more")


def check_method(analysis: Analysis, block: int, method: TokenMethod) -> None:
    facts = analysis.tokens
    point = facts.at(block)
    if point is None:
        raise UserError(impossible_block(analysis, block))
    if method.needs_scores and point.scores is None:
        raise UserError(
            f"--tokens: {method.name} needs attention weights, which block {block} does not compute apart; use merge"
        )
    if point.exits and not isinstance(method, Merge):
        raise UserError(
            f"--tokens: all tokens have to be back behind block {point.exits[-1].block}, and {method.name} cannot give "
            f"them back; use {' or '.join(m.name for m in TOKEN_METHODS.values() if isinstance(m, Merge))}"
        )
    if point.side_input and not method.only_selects:
        raise UserError(f"--tokens: after block {block}, {point.side_input} has an entry for each token; use topk")


def settings_for(
    points: Sequence[TokenPoint], request: TokenRequest, shares: Mapping[int, float] = NO_SHARES, count: int = 0
) -> list[StepSettings]:
    """Settings for every point, also where no token is removed. ``shares``: block -> average share that stays, where
    decided by content. ``count``: tokens before the first point, for inputs of any length; 0: that of the points."""
    whole = count = count or points[0].count
    settings, back, moved = [], 0, False
    for point in points:
        if 0 < back < point.block:
            count, back, moved = whole, 0, False
        others, removed = count - point.staying, 0
        if point.block in request:
            method, amount = request[point.block]
            going, share = (
                amount.removed_of(others),
                amount.share if method.input_adaptive or not point.fixed_length else None,
            )
            if share == 1:
                going, share = 0, None
            if share is not None:
                going = others - kept_count(method, others, shares[point.block] if method.input_adaptive else share)
            removed = max(0, min(going, method.max_removed(others)))
            protected = point.protected if not moved and (removed or share is not None) else ()
            settings.append(StepSettings(count, point.staying, removed, share, point.depth, protected))
            moved = moved or bool(protected)
            back = amount.unmerge.block if amount.unmerge is not None else 0
        else:
            settings.append(StepSettings(count, point.staying, 0))
        count -= removed
    return settings


def clamped_removals(analysis: Analysis, text: str) -> dict[int, tuple[int, int]]:
    """Block -> (tokens that ``text`` removes, tokens that can be removed), where the two differ."""
    request, points = parse_token_request(analysis, text), analysis.tokens.points
    if any(method.input_adaptive for method, _ in request.values()):
        return {}  # how many go depends on the input
    settings = {p.block: s for p, s in zip(points, settings_for(points, request), strict=True)}
    return {
        block: (amount.removed, settings[block].removed)
        for block, (_, amount) in request.items()
        if amount.share is None and amount.removed > settings[block].removed
    }


def check_offline_scores(point: TokenPoint, request: TokenRequest, offline: OfflineScores) -> None:
    """Raises UserError where the offline scores that a method needs are missing."""
    method, amount = request.get(point.block, (None, TokenAmount(0)))
    if method is None or not method.needs_offline or (method.input_adaptive and amount.share == 1):
        return
    if len(offline.get(point.block, ())) != (1 if method.input_adaptive else point.count):
        what = "the share of tokens that inputs keep" if method.input_adaptive else "the relevance of every position"
        raise UserError(f"--tokens: {method.name} needs {what}, which is measured: give --calib")


def steps_for(analysis: Analysis, request: TokenRequest, offline: OfflineScores) -> list[TokenStep]:
    """The steps of a request, without those at which no token is removed.

    Raises UserError where offline scores are needed and missing, or do not fit tokens that were merged before.
    """
    steps: list[TokenStep] = []
    points = analysis.tokens.points
    for point in points:
        check_offline_scores(point, request, offline)
    shares = {
        block: offline[block][0] for block, (method, _) in request.items() if method.input_adaptive and block in offline
    }
    for point, setting in zip(points, settings_for(points, request, shares), strict=True):
        if not setting.removed and setting.share is None:
            continue
        method, amount = request[point.block]
        if method.needs_offline and not method.input_adaptive and any(not s.method.only_selects for s in steps):
            raise UserError(f"--tokens: {method.name} scores positions, and merged tokens have none; put it first")
        if not method.input_adaptive and any(s.method.input_adaptive for s in steps):
            raise UserError(f"--tokens: adaptive leaves a dynamic number of tokens: put {method.name} before it")
        scores = tuple(offline[point.block]) if method.needs_offline else ()
        steps.append(TokenStep(point, method, setting, scores, amount.unmerge))
    return steps
