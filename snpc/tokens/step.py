"""One step of a token reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from snpc.passes.token_analysis import TokenExit, TokenFlow, TokenPoint
from snpc.tokens.methods import DecisionTensor, StepSettings, TokenMethod

UnmergeForm = Literal["delta", "copy"]


@dataclass(frozen=True)
class Unmerge:
    """All tokens are back behind ``block``.

    ``form``: "copy", every token is what it became part of, y_i = m'_a(i); or "delta", it keeps what set it apart and
    gets what was added since, y_i = x_i + m'_a(i) - m_a(i), with x and m the tokens before and after merging.
    """

    block: int
    form: UnmergeForm = "delta"


@dataclass(frozen=True)
class TokenStep:
    """A reduction after one block, by a method. ``offline``: what the method needs from calibration data: a score for
    each position of the full stream, or, for ``input_adaptive`` methods, the average share of tokens that stay.
    ``unmerge``: where all tokens are back; None: nowhere."""

    point: TokenPoint
    method: TokenMethod
    settings: StepSettings
    offline: tuple[float, ...] = ()
    unmerge: Unmerge | None = None

    @property
    def exit(self) -> TokenExit | None:
        return self.point.exit_at(self.unmerge.block) if self.unmerge is not None else None

    @property
    def flow(self) -> TokenFlow:
        """The tokens between this step and its exit, or the outputs."""
        return self.exit.flow if self.exit is not None else self.point.flow

    def follows(self, other: TokenStep) -> bool:
        """Does this step reduce what ``other`` left, which lies in front?"""
        return other.unmerge is None or other.unmerge.block >= self.point.block

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
