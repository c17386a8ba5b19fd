"""From how many rows second moments are summed: where tokens are many, some of every sample's stand for all of them.

The Gram matrix of n columns takes n^2 / 2 multiplications per row, as much as the layer itself where n is large, while
what it says improves little beyond eight rows per column: tokens of one sample are alike. One row of every ``stride``
adjacent ones is taken, at places that vary from one to the next, so that every sample keeps its share; samples, which
are not alike, are never left out. What is summed is weighted by the stride, so that it adds up with sums of all rows.

Up to ``MIN_ROWS`` rows are always taken: the Gram matrix of 2048 columns then takes 34 GMAC, a third of a second.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from snpc.graph import ShapeFacts
from snpc.passes import Analysis
from snpc.runtime.calibration import Calibration
from snpc.runtime.statistics.measure import StatisticRequest, activation_elements
from snpc.runtime.statistics.probe_layout import infer_probe_layout

ROWS_PER_COLUMN = 8
MIN_ROWS = 16384
MIN_ROWS_PER_SAMPLE = 8
PADDED_SHARE = 4  # where padding does not count, so many times as many rows are taken: how many count is not known yet
SINCE_OPSET = 11  # the operators that choose rows


@dataclass(frozen=True)
class SampledRows:
    """Second moments of ``groups`` groups, of so many ``columns``, are from ``seen`` of ``rows`` rows."""

    groups: int
    columns: int
    seen: int
    rows: int

    def describe(self) -> str:
        """``second moments of 12 groups from 25,216 of 100,864 rows of 3072 columns``"""
        groups = "one group" if self.groups == 1 else f"{self.groups} groups"
        return f"second moments of {groups} from {self.seen:,} of {self.rows:,} rows of {self.columns} columns"


def choose_strides(
    analysis: Analysis, calibration: Calibration, requests: Sequence[StatisticRequest], masked: Collection[str]
) -> list[StatisticRequest]:
    """The requests with the strides of their rows. ``masked``: tensors with rows that may not count."""
    if analysis.traced_graph.model.graph.opset_imports.get("", 0) < SINCE_OPSET:
        return list(requests)
    elements = activation_elements(analysis, calibration)
    return [
        replace(request, stride=stride_of(request, analysis.traced_graph.facts, elements, calibration, masked))
        if request.key.kind == "gram_joint"
        else request
        for request in requests
    ]


def stride_of(
    request: StatisticRequest,
    facts: ShapeFacts,
    elements: Mapping[str, float],
    calibration: Calibration,
    masked: Collection[str],
) -> int:
    """One row of how many is taken for this statistic."""
    of_batch = rows_of_batch(request, facts, elements)
    columns = request.group.size * request.columns * (PADDED_SHARE if request.probe.tensor in masked else 1)
    return row_stride(of_batch * calibration.whole_batches, of_batch / max(calibration.batch, 1), columns)


def rows_of_batch(request: StatisticRequest, facts: ShapeFacts, elements: Mapping[str, float]) -> float:
    """Rows of the statistic in the largest batch."""
    if request.window is None:
        layout = infer_probe_layout(request.probe, request.group.blocks * request.group.size)
        return elements.get(request.probe.tensor, 0) / max(layout.width, 1)
    output = request.window.outputs[0]
    shape = facts.shape.get(output)
    return elements.get(str(output.name), 0) / max(shape[1], 1) if shape else 0.0


def row_stride(rows: float, rows_per_sample: float, columns: int) -> int:
    """One row of how many is taken, a power of two: as many rows are left as ``columns`` take, and some of every
    sample's."""
    spare = min(rows / max(ROWS_PER_COLUMN * columns, MIN_ROWS), rows_per_sample / MIN_ROWS_PER_SAMPLE)
    return 1 << int(math.log2(spare)) if spare >= 2 else 1


def seen_shares(requests: Sequence[StatisticRequest]) -> Iterator[tuple[str, float]]:
    """(group id, share of the rows that are taken) of groups where some are left out."""
    strides: dict[str, int] = {}
    for request in requests:
        strides[request.group.id] = max(strides.get(request.group.id, 1), request.stride)
    return ((group_id, 1 / stride) for group_id, stride in strides.items() if stride > 1)
