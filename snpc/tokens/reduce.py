"""From ``merge:13@1-11`` to an analysis of the graph with fewer tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from snpc.errors import UserError
from snpc.passes.analyze import Analysis, analysed, cost_of
from snpc.passes.shapes import best_binding, evaluate
from snpc.passes.tokens import TokenPoint
from snpc.tokens import METHODS, method
from snpc.tokens.methods import Method, Setting
from snpc.tokens.rewrite import Step, close_tokens, open_tokens, stream_dtype

Offline = Mapping[int, Sequence[float]]
SPELLING = "must look like merge:13, topk:0.7@3,6,9 or merge:8@1-6+fuse:0.8@9"


@dataclass(frozen=True)
class Reduction:
    """What ``Analysis.reduction`` holds: the steps, and how to make an open graph decide them itself."""

    steps: tuple[Step, ...]
    dtypes: Mapping[str, ir.DataType] = field(repr=False)

    @property
    def spec(self) -> str:
        """The steps as text that ``reduce_tokens`` reads."""
        parts: dict[str, list[int]] = {}
        for step in self.steps:
            parts.setdefault(f"{step.method.name}:{step.setting.gone}", []).append(step.point.block)
        return "+".join(f"{what}@{','.join(map(str, blocks))}" for what, blocks in parts.items())

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the tensors that say which tokens go."""
        return tuple(name for step in self.steps for name in step.names)

    def close(self, model: ir.Model) -> None:
        """Make this open graph, in place, decide itself."""
        close_tokens(model, self.steps, self.dtypes)

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "steps": [
                {
                    "block": s.point.block,
                    "method": s.method.name,
                    "tokens": s.setting.count,
                    "after": s.left,
                    **({"offline": list(s.offline)} if s.offline else {}),
                }
                for s in self.steps
            ],
        }


def reduce_tokens(analysis: Analysis, text: str, offline: Offline | None = None) -> Analysis:
    """The analysis of the model with fewer tokens, by a specification such as ``topk:0.7@3,6,9``.

    ``offline``: scores of positions by block, for methods that need them (``runtime.relevance.token_relevance``).
    A share is kept, a whole number goes; blocks count from 1; without ``@`` it is every block where it is possible.
    Raises UserError where it cannot be done, saying why. An analysis comes back unchanged where no token goes.
    """
    return with_steps(analysis, parse_steps(analysis, text, offline or {}))


def needs_offline(text: str) -> bool:
    """Does the specification name a method that takes scores measured before? Of what is no method: no."""
    named = (part.partition(":")[0].strip() for part in text.split("+"))
    return any(METHODS[name].offline for name in named if name in METHODS)


def with_steps(analysis: Analysis, steps: Sequence[Step]) -> Analysis:
    if analysis.reduction is not None:
        raise UserError("the tokens of this model are reduced already")
    if not steps:
        return analysis
    graph = analysis.model.graph
    binding, facts = best_binding(graph)
    reduction = Reduction(tuple(steps), {s.point.value: stream_dtype(facts, s.point) for s in steps})
    opened = open_tokens(graph, facts, binding, steps)
    closed = opened.clone()
    reduction.close(closed)
    quoted = dict(analysis.binding)
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


def parse_steps(analysis: Analysis, text: str, offline: Offline) -> list[Step]:
    wanted: dict[int, tuple[Method, Amount]] = {}
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(\w+):([0-9.]+)(?:@([\d,\-\s]+))?\s*", part)
        if found is None:
            raise UserError(f"--tokens {text!r}: {SPELLING}")
        made, much = method(found[1]), amount(text, found[2])
        for block in blocks(analysis, text, found[3]):
            check_point(analysis, block, made)
            if block in wanted:
                raise UserError(f"--tokens {text!r}: block {block} is named twice; keep one")
            wanted[block] = (made, much)
    return steps_for(analysis, wanted, offline)


@dataclass(frozen=True)
class Amount:
    """``share`` of the tokens are kept, or (None) ``gone`` go."""

    gone: int
    share: float | None = None

    def going(self, others: int) -> int:
        return self.gone if self.share is None else others - math.ceil(others * self.share - 1e-9)


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


def check_point(analysis: Analysis, block: int, made: Method) -> None:
    facts = analysis.tokens
    point = facts.at(block)
    possible = ", ".join(str(p.block) for p in facts.points)
    if point is None:
        raise UserError(f"--tokens: not after block {block} of {facts.blocks}; it is possible after {possible}")
    if made.scored and (point.scores is None or (point.scores.fused and not point.reads)):
        raise UserError(f"--tokens: {made.name} needs attention weights that block {block} does not show; use merge")
    if point.sided and not made.selects:
        raise UserError(f"--tokens: behind block {block} tokens meet {point.sided}, an entry for each; use topk")
    if made.weighs and point.summed:
        raise UserError(f"--tokens: tokens are summed behind block {block}, so merged ones would count less; use topk")


Wanted = Mapping[int, tuple[Method, Amount]]


def settings_for(points: Sequence[TokenPoint], wanted: Wanted) -> list[Setting]:
    """One for every point, those included at which no token goes."""
    count, found = points[0].count, []
    for point in points:
        others, gone = count - point.leading, 0
        if point.block in wanted:
            made, much = wanted[point.block]
            gone = max(0, min(much.going(others), made.most(others)))
        found.append(Setting(count, point.leading, gone))
        count -= gone
    return found


def steps_for(analysis: Analysis, wanted: Wanted, offline: Offline) -> list[Step]:
    """Steps at these blocks; those at which no token goes are left out.

    Raises UserError where offline scores are needed and missing, or do not fit tokens that were merged before.
    """
    steps: list[Step] = []
    points = analysis.tokens.points
    for point, setting in zip(points, settings_for(points, wanted), strict=True):
        if not setting.gone:
            continue
        made, _ = wanted[point.block]
        if made.offline and any(not s.method.selects for s in steps):
            raise UserError(f"--tokens: {made.name} scores positions, which merged tokens have not; put it first")
        if made.offline and len(offline.get(point.block, ())) != point.count:
            raise UserError(f"--tokens: {made.name} needs the relevance of every position: give --calib")
        steps.append(Step(point, made, setting, tuple(offline[point.block]) if made.offline else ()))
    return steps
