"""One step of a token reduction."""

from __future__ import annotations

from dataclasses import dataclass

from snpc.passes.token_analysis import TokenPoint
from snpc.tokens.methods import DecisionTensor, StepSettings, TokenMethod


@dataclass(frozen=True)
class TokenStep:
    """A reduction after one block, by a method. ``offline``: what the method needs from calibration data: a score for
    each position of the full stream, or, for ``input_adaptive`` methods, the average share of tokens that stay."""

    point: TokenPoint
    method: TokenMethod
    settings: StepSettings
    offline: tuple[float, ...] = ()

    @property
    def prefix(self) -> str:
        return f"tokens_{self.point.block}"

    @property
    def positions(self) -> tuple[float, ...]:
        """Scores of positions, where the method takes such."""
        return () if self.method.input_adaptive else self.offline

    @property
    def decisions(self) -> tuple[DecisionTensor, ...]:
        return self.method.decisions(self.settings)

    @property
    def names(self) -> list[str]:
        """Of the decisions, inputs of the open graph and values of the closed one."""
        return [f"{self.prefix}_{d.name}" for d in self.decisions]

    @property
    def remaining(self) -> int:
        return self.settings.count - self.settings.removed
