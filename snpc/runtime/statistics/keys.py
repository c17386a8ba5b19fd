"""The name of a statistic: what is summed, over which activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from snpc.errors import UserError
from snpc.types import ProbeKind

StatisticKind = Literal[
    "energy", "gram", "moment", "gram_centered", "row_sums", "gram_per_repeat", "gram_joint", "score_loss", "routed"
]
"""Each but "score_loss" is a method of ``Instrument``; that is in ``score_loss.py``."""

CLOSED_FORM_STATISTICS = frozenset(get_args(StatisticKind)) - {"energy", "gram", "routed"}
"""The kinds that closed forms take; criteria take the others."""


@dataclass(frozen=True)
class StatisticKey:
    """Names a statistic of a group, as ``kind`` over the activations that ``probe`` kinds show.

    With ``consumer`` and ``use`` it is over one activation only: the one that node number ``use`` of consumer weight
    number ``consumer`` reads. In text: "gram:query", or "gram_joint:hidden#0.1" for use 1 of consumer 0.
    """

    kind: StatisticKind
    probe: ProbeKind
    consumer: int | None = None
    use: int | None = None

    def __str__(self) -> str:
        where = "" if self.consumer is None else f"#{self.consumer}.{self.use}"
        return f"{self.kind}:{self.probe}{where}"

    @classmethod
    def parse(cls, text: str) -> StatisticKey:
        """The key of its text. Raises UserError where there is no such statistic."""
        kind, _, rest = text.partition(":")
        probe, _, where = rest.partition("#")
        if kind not in get_args(StatisticKind) or probe not in get_args(ProbeKind):
            raise UserError(
                f"{text!r} is no statistic that can be measured: a criterion may ask for energy:K and gram:K with K "
                f"one of {', '.join(get_args(ProbeKind))}, and with torch for gate:loss, gate:weights, gate:relevance, "
                "gate:sensitivity, gate:macs and gate:memory"
            )
        consumer, _, use = where.partition(".")
        indices = (int(consumer), int(use)) if where else (None, None)
        return cls(cast(StatisticKind, kind), cast(ProbeKind, probe), *indices)
