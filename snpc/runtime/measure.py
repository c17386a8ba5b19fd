"""Which statistics are wanted of which activations, and a pass over the data that gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.instrument import Instrument
from snpc.runtime.padding import padding_of, probe_rows, token_masks
from snpc.runtime.scratch import scratch
from snpc.types import FloatArray, Group, Probe

HELD = 4 * 3  # bytes of an activation's element while it is measured: float32, as it is, turned, and in rows
ADDED = 4 + 8 + 8  # bytes of a statistic's element: as it comes, in float64, and in the sum


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


def split(
    analysis: Analysis, calibration: Calibration, wanted: Sequence[Wanted], limit: int
) -> Iterator[tuple[Wanted, ...]]:
    """``wanted`` in parts that take about ``limit`` bytes each to measure, beside the model itself; what is wanted of a
    group stays together. Raises UserError where one group takes more."""
    elements = probed_elements(analysis, calibration)
    part: list[Wanted] = []
    for group in {item.group.id: item.group for item in wanted}.values():
        mine = [item for item in wanted if item.group is group]
        alone = bytes_of(mine, elements, calibration.batch)
        if alone > limit:
            needed = f"{2 * alone // 1000 + 1}kB" if alone < 10**6 else f"{2 * alone // 10**6 + 1}MB"
            raise UserError(
                f"statistics of {group.id} take about {needed}, more than there is for them: give --memory-limit "
                f"{needed} or more, or a smaller --calib-batch"
            )
        if part and bytes_of([*part, *mine], elements, calibration.batch) > limit:
            yield tuple(part)
            part = []
        part += mine
    if part:
        yield tuple(part)


def probed_elements(analysis: Analysis, calibration: Calibration) -> dict[str, float]:
    """Tensor -> about how many elements it has in the largest batch: what it has as analysed, scaled as the inputs."""
    facts = analysis.traced.facts
    sizes = {str(v.name): math.prod(shape) for v, shape in facts.shape.items() if shape is not None}
    growth = max((count / max(sizes.get(name, count), 1) for name, count in calibration.largest().items()), default=1)
    return {name: size * growth for name, size in sizes.items()}


def bytes_of(wanted: Sequence[Wanted], elements: Mapping[str, float], batch: int) -> int:
    """About how much measuring these takes at once."""
    held = sum(elements.get(tensor, 0) for tensor in {item.probe.tensor for item in wanted}) * HELD
    return int(held + ADDED * sum(statistic_elements(item, batch) for item in wanted))


def statistic_elements(item: Wanted, batch: int) -> int:
    blocks, size = item.group.blocks, item.group.size
    square = item.kind in ("gram", "moment", "centred")
    per_sample = item.kind in ("gram", "energy")
    return blocks * (size * size if square else size + 1) * (batch if per_sample else 1)


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
