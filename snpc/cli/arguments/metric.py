"""How outputs are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import snpc
from snpc.cli.arguments.group import ArgumentGroup, option
from snpc.errors import UserError
from snpc.runtime.evaluation import TaskMetric, is_task_metric, parse_task_metric, with_metrics

METRIC_HELP = (
    "How a changed output is judged, in loss curves, token schedules, --max-drift and what is printed: kl (scores of "
    "classes), relative, cosine, mismatch, none, or a function (original, pruned) -> distance in a file, which is run. "
    "Repeatable, with OUTPUT= for one output. With --labels also how the first output is scored: top1, top5, f1, "
    "spearman, or a function (output, labels) -> score.  [default: what suits each output; top1; --max-drift is "
    "relative]"
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
        return with_metrics(analysis, self.distances or None)

    @property
    def distances(self) -> tuple[str, ...]:
        """Those that compare outputs with the original's."""
        return tuple(text for text in self.metric if not is_task_metric(text))

    def task(self) -> TaskMetric | None:
        """That which scores outputs on labels. UserError for more than one."""
        names = [text for text in self.metric if is_task_metric(text)]
        if len(names) > 1:
            raise UserError(f"--metric {' and '.join(names)}: one of them scores the labels; keep one")
        return parse_task_metric(names[0]) if names else None
