"""The oracle of removed layers: the whole graph, with what stands for them in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snpc.errors import CheckFailed
from snpc.passes import Analysis
from snpc.passes.sublayers import switch_name, with_switches
from snpc.runtime.evaluation.compare import batch_differences, max_relative
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.types import Difference, Feeds


def check_removed_layers(
    analysis: Analysis, batches: Sequence[Feeds], tolerance: float, execution: Execution = DEFAULT_EXECUTION
) -> str:
    """The check in words. Raises CheckFailed where the graph without the layers gives other outputs than that in which
    they are replaced in place."""
    differences = compare_in_place(analysis, batches, execution)
    for difference in differences:
        if difference.relative > tolerance:
            raise CheckFailed(
                f"output {difference.output}: the graph without its layers differs from that in which they are "
                f"replaced in place by {difference.relative:.1e} relative, more than {tolerance:.0e}"
            )
    count = len(analysis.removal.sublayers) if analysis.removal is not None else 0
    layers = "layer that is gone equals it" if count == 1 else "layers that are gone equal them"
    return f"{count} {layers} replaced in place to {max_relative(differences):.1e}"


def compare_in_place(
    analysis: Analysis, batches: Sequence[Feeds], execution: Execution = DEFAULT_EXECUTION
) -> tuple[Difference, ...]:
    """Differences between the graph without the layers, before widths are cut, and the oracle."""
    removal = analysis.removal
    assert removal is not None
    off = {switch_name(name): np.array(False) for name in removal.names}
    switched = with_switches(removal.source, removal.sublayers, removal.substitutes)
    with temporary_session(switched, execution=execution, optimization="basic") as run:
        expected = [run({**feeds, **off}) for feeds in batches]
    shorter = analysis.traced_graph.model.clone()
    with temporary_session(shorter, execution=execution, optimization="basic") as run:
        return batch_differences(expected, [run(feeds) for feeds in batches])
