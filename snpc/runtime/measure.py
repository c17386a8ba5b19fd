"""Which statistics are wanted of which activations, and a pass over the data that gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.passes.analyze import Analysis
from snpc.runtime.feeds import Feeds
from snpc.runtime.instrument import Instrument
from snpc.runtime.padding import padding_of, probe_rows, token_masks
from snpc.runtime.scratch import scratch
from snpc.types import FloatArray, Group, Probe


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
    """Run the instrumented model over ``batches``; per batch: output name -> statistic in float64. Padded tokens do not
    count."""
    source = analysis.traced
    padding = padding_of(source, probe_rows((w.probe, w.group.blocks * w.group.size) for w in wanted))
    instrument = Instrument(source.model, padding.told)
    for item in wanted:
        instrument.add(item.kind, item.probe, item.group.blocks, item.group.size, item.output)
    with (
        token_masks(source, padding, provider, threads) as masks,
        scratch(instrument.model, provider=provider, threads=threads) as run,
    ):
        for feeds in batches:
            found = run({**feeds, **masks(feeds)})
            yield {name: np.asarray(array, np.float64) for name, array in found.items()}
