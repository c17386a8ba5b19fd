"""From ``merge:13@1-11`` to an analysis of the graph with fewer tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from snpc.errors import UserError
from snpc.graph.shapes import best_binding, evaluate
from snpc.passes.analyze import Analysis, analysed, cost_of
from snpc.passes.canonicalization.fold_shape_arithmetic import settle_sizes
from snpc.passes.token_analysis.reduction_points import TokenPoint
from snpc.tokens import method
from snpc.tokens.close import close_tokens
from snpc.tokens.dynamic_lengths import kept, kept_sizes, resized
from snpc.tokens.methods import Method, Setting, share_kept
from snpc.tokens.open import batch_dimension, decision_shape, open_tokens, stream_dtype
from snpc.tokens.step import Step

Offline = Mapping[int, Sequence[float]]
Wanted = Mapping[int, tuple[Method, "Amount"]]
NOTHING: Mapping[int, float] = MappingProxyType({})
SPELLING = "must look like merge:13, topk:0.7@3,6,9 or merge:8@1-6+fuse:0.8@9"


@dataclass(frozen=True)
class Reduction:
    """What ``Analysis.reduction`` holds: the steps, and how to make an open graph decide them itself. ``quoted``: the
    steps with as many tokens as there are where MACs are quoted (empty: the same)."""

    steps: tuple[Step, ...]
    dtypes: Mapping[str, ir.DataType] = field(repr=False)
    quoted: tuple[Step, ...] = ()

    @property
    def spec(self) -> str:
        """The steps as text that ``reduce_tokens`` reads."""
        parts: dict[str, list[int]] = {}
        for step in self.steps:
            setting = step.setting
            much = setting.gone if setting.share is None else setting.share
            parts.setdefault(f"{step.method.name}:{much}", []).append(step.point.block)
        return "+".join(f"{what}@{','.join(map(str, blocks))}" for what, blocks in parts.items())

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the tensors that say which tokens go."""
        return tuple(name for step in self.steps for name in step.names)

    def close(self, model: ir.Model) -> None:
        """Make this open graph, in place, decide itself."""
        close_tokens(model, self.steps, self.dtypes)

    def finish(self, model: ir.Model) -> None:
        """As ``close``, for what is written or timed: sizes that are fixed now are not computed any more."""
        self.close(model)
        settle_sizes(model)

    def mark(self, model: ir.Model) -> None:
        """Give the decisions of a closed graph their shapes, with names for the sizes that are computed."""
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
                    "tokens": s.setting.count,
                    "after": s.left,
                    **({"any_length": True} if not s.point.fixed else {}),
                    **({"on_average": True} if s.method.adapts else {}),
                    **({"offline": list(s.offline)} if s.offline else {}),
                }
                for s in self.quoted or self.steps
            ],
        }


def reduce_tokens(analysis: Analysis, text: str, offline: Offline | None = None) -> Analysis:
    """The analysis of the model with fewer tokens, by a specification such as ``topk:0.7@3,6,9``.

    ``offline``: by block what methods need that was measured before (``runtime.token_request.measured``).
    A share is kept, a whole number goes; blocks count from 1; without ``@`` it is every block where it is possible.
    Raises UserError where it cannot be done, saying why. An analysis comes back unchanged where no token goes.
    """
    return with_steps(analysis, steps_for(analysis, parse_wanted(analysis, text), offline or {}))


def with_steps(analysis: Analysis, steps: Sequence[Step]) -> Analysis:
    if analysis.reduction is not None:
        raise UserError("the tokens of this model are reduced already")
    if not steps:
        return analysis
    graph = analysis.model.graph
    binding, facts = best_binding(graph)
    dtypes = {s.point.value: stream_dtype(facts, s.point) for s in steps}
    there = resized(steps, evaluate(graph, dict(analysis.binding)))
    reduction = Reduction(tuple(steps), dtypes, tuple(there))
    opened = open_tokens(graph, facts, binding, steps)
    closed = opened.clone()
    reduction.close(closed)
    binding = {**binding, **kept_sizes(steps)}
    quoted = {**analysis.binding, **kept_sizes(there)}
    extra = cost_of(closed, evaluate(closed, quoted)).macs - cost_of(opened, evaluate(opened, quoted)).macs
    return analysed(
        analysis.model,
        opened,
        (binding, evaluate(opened, binding)),
        (quoted, evaluate(opened, quoted)),
        analysis.cost,
        tokens=analysis.tokens,
        reduction=reduction,
        extra_macs=extra,
        kv_cache=analysis.traced.kv_cache,
    )


# -- reading ---------------------------------------------------------------------------------------------------------


def parse_wanted(analysis: Analysis, text: str) -> Wanted:
    """Block -> method and how many tokens, as ``text`` says. Raises UserError where it cannot be read or done."""
    wanted: dict[int, tuple[Method, Amount]] = {}
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(\w+):([0-9.]+)(?:@([\d,\-\s]+))?\s*", part)
        if found is None:
            raise UserError(f"--tokens {text!r}: {SPELLING}")
        made, much = method(found[1]), amount(text, found[2])
        for block in blocks(analysis, text, found[3]):
            check_point(analysis, block, made)
            check_amount(analysis, block, made, much)
            if block in wanted:
                raise UserError(f"--tokens {text!r}: block {block} is named twice; keep one")
            wanted[block] = (made, much)
    return wanted


@dataclass(frozen=True)
class Amount:
    """``share`` of the tokens are kept, or (None) ``gone`` go."""

    gone: int
    share: float | None = None

    def going(self, others: int) -> int:
        return self.gone if self.share is None else others - share_kept(others, self.share)


def amount(text: str, digits: str) -> Amount:
    if digits.isdigit():
        return Amount(int(digits))
    try:
        share = float(digits)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UserError(
            f"--tokens {text!r}: {digits} is neither a share to keep (0.7) nor a number of tokens that go (13)"
        )
    return Amount(0, share)


def blocks(analysis: Analysis, text: str, listed: str | None) -> list[int]:
    facts = analysis.tokens
    if not facts.points:
        raise UserError(f"{analysis.model.path.name}: its tokens cannot be reduced{why_not(analysis)}")
    if listed is None:
        return [p.block for p in facts.points]
    found: list[int] = []
    for item in listed.replace(" ", "").split(","):
        first, _, last = item.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise UserError(f"--tokens {text!r}: {SPELLING}")
        found += range(int(first), int(last or first) + 1)
    return found


def why_not(analysis: Analysis) -> str:
    pin = next(iter(analysis.tokens.pins), None)
    return f": {pin.reason} ({pin.operator})" if pin is not None else ": it has no attention over tokens"


def check_amount(analysis: Analysis, block: int, made: Method, much: Amount) -> None:
    point = analysis.tokens.at(block)
    assert point is not None
    if made.adapts and much.share is None:
        raise UserError(f"--tokens: {made.name} takes a share of the scores that the kept tokens have: {made.name}:0.9")
    if point.fixed or (made.counts and much.share is not None):
        return
    raise UserError("--tokens: inputs have different numbers of tokens: give topk and a share (topk:0.7@3,6)")


def check_point(analysis: Analysis, block: int, made: Method) -> None:
    facts = analysis.tokens
    point = facts.at(block)
    possible = ", ".join(str(p.block) for p in facts.points)
    if point is None:
        raise UserError(f"--tokens: not after block {block} of {facts.blocks}; it is possible after {possible}")
    if made.scored and point.scores is None:
        raise UserError(f"--tokens: {made.name} needs attention weights that block {block} does not show; use merge")
    if point.sided and not made.selects:
        raise UserError(f"--tokens: behind block {block} tokens meet {point.sided}, an entry for each; use topk")


def settings_for(
    points: Sequence[TokenPoint], wanted: Wanted, shares: Mapping[int, float] = NOTHING, count: int = 0
) -> list[Setting]:
    """One for every point, those included at which no token goes. ``shares``: how many stay on average where contents
    decide; ``count``: tokens in front of the first point, where inputs have any number of them (0: the points')."""
    count, found = count or points[0].count, []
    for point in points:
        others, gone = count - point.leading, 0
        if point.block in wanted:
            made, much = wanted[point.block]
            going, share = much.going(others), much.share if made.adapts or not point.fixed else None
            if share == 1:
                going, share = 0, None
            if share is not None:
                going = others - kept(made, others, shares[point.block] if made.adapts else share)
            gone = max(0, min(going, made.most(others)))
            found.append(Setting(count, point.leading, gone, share))
        else:
            found.append(Setting(count, point.leading, 0))
        count -= gone
    return found


def check_measured(point: TokenPoint, wanted: Wanted, offline: Offline) -> None:
    """Raises UserError where a method lacks what has to be measured before."""
    made, much = wanted.get(point.block, (None, Amount(0)))
    if made is None or not made.offline or (made.adapts and much.share == 1):
        return
    if len(offline.get(point.block, ())) != (1 if made.adapts else point.count):
        what = "how many tokens inputs keep" if made.adapts else "the relevance of every position"
        raise UserError(f"--tokens: {made.name} needs {what}: give --calib")


def steps_for(analysis: Analysis, wanted: Wanted, offline: Offline) -> list[Step]:
    """Steps at these blocks; those at which no token goes are left out.

    Raises UserError where offline scores are needed and missing, or do not fit tokens that were merged before.
    """
    steps: list[Step] = []
    points = analysis.tokens.points
    for point in points:
        check_measured(point, wanted, offline)
    shares = {block: offline[block][0] for block, (made, _) in wanted.items() if made.adapts and block in offline}
    for point, setting in zip(points, settings_for(points, wanted, shares), strict=True):
        if not setting.gone and setting.share is None:
            continue
        made, _ = wanted[point.block]
        if made.offline and not made.adapts and any(not s.method.selects for s in steps):
            raise UserError(f"--tokens: {made.name} scores positions, which merged tokens have not; put it first")
        if not made.adapts and any(s.method.adapts for s in steps):
            raise UserError(f"--tokens: how many tokens adaptive leaves is not fixed: put {made.name} before it")
        steps.append(Step(point, made, setting, tuple(offline[point.block]) if made.offline else ()))
    return steps
