"""Which statistics are wanted of which activations, and a pass over the data that gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.propagation.state import Contraction
from snpc.passes.weights.attention_operands import score_products
from snpc.passes.weights.consumers import consumer_uses
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, Execution
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.packed_symmetric import packed_length
from snpc.runtime.statistics.padding import find_padding, probe_row_counters, token_mask_runner
from snpc.runtime.statistics.score_loss import score_loss_matrix
from snpc.types import AnyArray, Feeds, FloatArray, Group, Probe

ACTIVATION_BYTES = (
    4 * 3
)  # bytes of an activation's element while it is measured: float32, as it is, turned, and in rows
STATISTIC_BYTES = 4 + 8  # bytes of a statistic's element: as it comes, and in the sum


@dataclass(frozen=True)
class StatisticRequest:
    """One statistic of one group: ``kind`` is a method of ``Instrument`` (energy, gram, moment, centred, sums, apart,
    joint), or "coupled"; ``output`` names the instrumented model's output. ``use`` is named "0.1" where it is what the
    second node sees that uses the first reader; ``product`` that in which ``probe`` meets its ``partner``."""

    group: Group
    probe: Probe
    kind: str
    output: str
    key: str = ""
    window: ir.Node | None = None
    columns: int = 1
    product: Contraction | None = None
    partner: Probe | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.probe.kind}{'#' if self.key else ''}{self.key}"

    def add_to(self, instrument: Instrument) -> None:
        """As a new output of the instrumented model."""
        if self.kind == "joint":
            instrument.add_output(instrument.gram_joint(self.probe, self.group.size, self.window), self.output)
        elif self.product is not None:
            instrument.add_output(score_loss_matrix(instrument, self.product, self.group), self.output)
        else:
            instrument.add_statistic(self.kind, self.probe, self.group.blocks, self.group.size, self.output)


def statistic_requests(analysis: Analysis, names: Mapping[str, Sequence[str]]) -> list[StatisticRequest]:
    """Statistics to measure: group id -> names such as "gram:query"."""
    found: list[StatisticRequest] = []
    for group in analysis.groups:
        for name in names.get(group.id, ()):
            kind, _, rest = name.partition(":")
            probe_kind, sharp, use = rest.partition("#")
            if kind == "coupled":
                products = score_products(analysis.traced_graph, group)
                found += [score_loss_request(group, c, f"snpc_stat_{len(found) + k}") for k, c in enumerate(products)]
                continue
            if sharp:
                found.append(consumer_request(analysis, group, kind, use, f"snpc_stat_{len(found)}"))
                continue
            for probe in group.probes:
                if probe.kind == probe_kind:
                    found.append(StatisticRequest(group, probe, kind, f"snpc_stat_{len(found)}"))
    return found


def score_loss_request(group: Group, product: Contraction, output: str) -> StatisticRequest:
    """What the scores of one product lose."""
    probes = {p.tensor: p for p in group.probes}
    query, key = probes[product.left.name], probes[product.right.name]
    return StatisticRequest(group, query, "coupled", output, product=product, partner=key)


def consumer_request(analysis: Analysis, group: Group, kind: str, use: str, output: str) -> StatisticRequest:
    """A statistic of what one node sees that uses a reader."""
    reader, _, node = use.partition(".")
    seen = consumer_uses(analysis.traced_graph, group)[int(reader)][int(node)]
    window = seen.node if seen.reader.taps > 1 else None
    return StatisticRequest(group, seen.probe, kind, output, use, window, seen.reader.columns)


def split_by_memory(
    analysis: Analysis, calibration: Calibration, wanted: Sequence[StatisticRequest], limit: int
) -> Iterator[tuple[StatisticRequest, ...]]:
    """``wanted`` in parts that take about ``limit`` bytes each to measure, beside the model itself; what is wanted of a
    group stays together. Raises UserError where one group takes more."""
    elements = activation_elements(analysis, calibration)
    part: list[StatisticRequest] = []
    for group in {item.group.id: item.group for item in wanted}.values():
        mine = [item for item in wanted if item.group is group]
        alone = measurement_bytes(mine, elements, calibration.batch)
        if alone > limit:
            needed = f"{2 * alone // 1000 + 1}kB" if alone < 10**6 else f"{2 * alone // 10**6 + 1}MB"
            raise UserError(
                f"statistics of {group.id} take about {needed}, more than there is for them: give --memory-limit "
                f"{needed} or more, or a smaller --calib-batch"
            )
        if part and measurement_bytes([*part, *mine], elements, calibration.batch) > limit:
            yield tuple(part)
            part = []
        part += mine
    if part:
        yield tuple(part)


def activation_elements(analysis: Analysis, calibration: Calibration) -> dict[str, float]:
    """Tensor -> about how many elements it has in the largest batch: what it has as analysed, scaled as the inputs."""
    facts = analysis.traced_graph.facts
    sizes = {str(v.name): math.prod(shape) for v, shape in facts.shape.items() if shape is not None}
    growth = max(
        (count / max(sizes.get(name, count), 1) for name, count in calibration.max_elements().items()), default=1
    )
    return {name: size * growth for name, size in sizes.items()}


def measurement_bytes(wanted: Sequence[StatisticRequest], elements: Mapping[str, float], batch: int) -> int:
    """About how much measuring these takes at once."""
    windows = {item.probe.tensor: item.columns if item.window is not None else 1 for item in wanted}
    windows |= {item.partner.tensor: 1 for item in wanted if item.partner is not None}
    held = sum(elements.get(tensor, 0) * taps for tensor, taps in windows.items()) * ACTIVATION_BYTES
    return int(held + STATISTIC_BYTES * sum(statistic_elements(item, batch) for item in wanted))


def statistic_elements(item: StatisticRequest, batch: int) -> int:
    blocks, size = item.group.blocks, item.group.size
    if item.kind == "joint":
        return packed_length(size * item.columns + 1)
    if item.kind == "apart":
        return item.columns * blocks * (size + 1) ** 2
    square = item.kind in ("gram", "moment", "centred", "coupled")
    per_sample = item.kind in ("gram", "energy")
    return blocks * (size * size if square else size + 1) * (batch if per_sample else 1)


def measure_batches(
    analysis: Analysis,
    wanted: Sequence[StatisticRequest],
    batches: Iterable[Feeds],
    *,
    execution: Execution = DEFAULT_EXECUTION,
) -> Iterator[dict[str, AnyArray]]:
    """Run the instrumented model over ``batches``; per batch: output name -> statistic, in float32 (sums over batches
    are for the caller, in float64). Padded tokens do not count.
    """
    source = analysis.traced_graph
    probes = [(p, w.group.blocks * w.group.size) for w in wanted for p in (w.probe, w.partner) if p is not None]
    padding = find_padding(source, probe_row_counters(probes))
    instrument = Instrument(source.model, padding.row_masks)
    for item in wanted:
        item.add_to(instrument)
    with (
        token_mask_runner(source, padding, execution) as masks,
        temporary_session(instrument.model, execution=execution) as run,
    ):
        for feeds in batches:
            yield run({**feeds, **masks(feeds)})


def accumulate(total: FloatArray, part: AnyArray) -> None:
    """Add to a sum in float64, in place and without a copy of the part in float64."""
    np.add(total, part, out=total)
