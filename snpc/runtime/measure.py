"""Statistics inside the graph: sums that onnxruntime computes beside the model, so that activations are never held.

For each probe (an activation in which a group's units can be seen) the instrumented model gets a few more outputs:
``energy`` [samples, blocks, size], the sum over rows of squares, and ``gram`` [samples, blocks, size, size], X^T X.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.passes.analyze import Analysis
from snpc.runtime.feeds import Feeds
from snpc.runtime.scratch import scratch
from snpc.types import FloatArray, Group, IntArray, Probe


@dataclass(frozen=True)
class Wanted:
    """One statistic of one group: ``kind`` is a method of ``Instrument`` (energy, gram, moment, centred, sums);
    ``output`` names the instrumented model's output."""

    group: Group
    probe: Probe
    kind: str
    output: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.probe.kind}"


def wanted_statistics(analysis: Analysis, names: Mapping[str, Sequence[str]]) -> list[Wanted]:
    """Statistics to measure: group id -> names such as "gram:query"."""
    found: list[Wanted] = []
    for group in analysis.groups:
        for name in names.get(group.id, ()):
            kind, _, probe_kind = name.partition(":")
            for probe in group.probes:
                if probe.kind == probe_kind:
                    found.append(Wanted(group, probe, kind, f"snpc_stat_{len(found)}"))
    return found


def measure(
    analysis: Analysis, wanted: Sequence[Wanted], batches: Iterable[Feeds], *, provider: str = "cpu", threads: int = 0
) -> Iterator[dict[str, FloatArray]]:
    """Run the instrumented model over ``batches``; per batch: output name -> statistic in float64."""
    instrument = Instrument(analysis.traced.model)
    for item in wanted:
        instrument.add(item)
    with scratch(instrument.model, provider=provider, threads=threads) as run:
        for feeds in batches:
            yield {name: np.asarray(array, np.float64) for name, array in run(feeds).items()}
