"""What quantizing refitted weights anew costs, apart from what pruning costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snpc.passes.slicing import RewrittenModel
from snpc.runtime.batches import open_graph, run_each
from snpc.runtime.evaluation.compare import batch_differences, narrow_caches, run_dequantized
from snpc.runtime.evaluation.metrics import OutputMetrics
from snpc.runtime.execution import Execution
from snpc.types import Feeds, Requantization


def measure_requantization(
    rewritten: RewrittenModel, written: Path, batches: Sequence[Feeds], metrics: OutputMetrics, execution: Execution
) -> Requantization:
    """How far the float model of the ``written`` file is from the cut float model that was quantized for it."""
    assert rewritten.rounded is not None
    if not rewritten.rounded or not batches:
        return Requantization(rewritten.as_stored, len(rewritten.rounded))
    cut = rewritten.sliced_interface()
    feeds = [narrow_caches(batch, cut) for batch in batches]
    with open_graph(rewritten.model.clone(), rewritten.source.facts, execution) as run:
        floats = list(run_each(run, feeds, execution))
    differences = batch_differences(floats, run_dequantized(written, feeds, execution), metrics)
    return Requantization(rewritten.as_stored, len(rewritten.rounded), differences)
