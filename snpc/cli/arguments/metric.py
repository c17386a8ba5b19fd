"""How outputs are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import snpc
from snpc.cli.arguments.group import ArgumentGroup, option
from snpc.runtime.evaluation import with_metrics

METRIC_HELP = (
    "How a changed output is judged, in loss curves, token schedules, --max-drift and what is printed: kl (scores of "
    "classes), relative, cosine, mismatch, none, or a function (original, pruned) -> distance in a file, which is run. "
    "Repeatable, with OUTPUT= for one output.  [default: what suits each output; --max-drift is relative]"
)


@dataclass(frozen=True)
class MetricArguments(ArgumentGroup):
    """How outputs are judged."""

    section: ClassVar[str] = "Checks"

    metric: tuple[str, ...] = option(
        "--metric", multiple=True, metavar="[OUTPUT=]NAME|FILE.py:FUNCTION", help=METRIC_HELP
    )

    def apply(self, analysis: snpc.Analysis) -> snpc.Analysis:
        """The analysis with outputs judged as --metric says."""
        return with_metrics(analysis, self.metric or None)
