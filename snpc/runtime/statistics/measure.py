"""Requests for statistics of activations, and a pass over the calibration data that measures them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from snpc.criteria import Criterion
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.propagation import Contraction
from snpc.runtime.batches import packed_length
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, temporary_session
from snpc.runtime.statistics.gate_gradients import GATE_PREFIX
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.keys import StatisticKey
from snpc.runtime.statistics.padding import (
    PaddingMasks,
    find_padding,
    probe_row_counters,
    token_mask_runner,
)
from snpc.runtime.statistics.score_loss import score_loss_matrix
from snpc.types import AnyArray, Feeds, Group, Probe

ACTIVATION_BYTES = 4 * 3  # per element of a measured activation: float32 as it is, transposed, and as rows
STATISTIC_BYTES = 4 + 8 + 4  # per element of a statistic: float32 of a batch, the sum in float64, and a half of it


@dataclass(frozen=True)
class StatisticRequest:
    """One statistic to measure for a group, as ``output`` of the instrumented model.

    ``probe``: the activation. ``window``: the convolution through which it is read, if any. ``columns``: how many
    columns show one unit. ``product``: for "score_loss", the product in which ``probe`` meets ``partner``. ``stride``:
    of how many rows one is taken.
    """

    group: Group
    probe: Probe
    key: StatisticKey
    output: str
    window: ir.Node | None = None
    columns: int = 1
    product: Contraction | None = None
    partner: Probe | None = None
    stride: int = 1

    def add_to(self, instrument: Instrument) -> None:
        """Add the statistic to the instrumented model, as a new output."""
        if self.key.kind == "gram_joint":
            units = self.group.blocks * self.group.size
            gram = instrument.gram_joint(self.probe, units, self.window, self.stride)
            instrument.add_output(gram, self.output)
        elif self.product is not None:
            instrument.add_output(score_loss_matrix(instrument, self.product, self.group), self.output)
        else:
            instrument.add_statistic(self.key.kind, self.probe, self.group.blocks, self.group.size, self.output)


def criterion_keys(criterion: Criterion, group: Group) -> list[StatisticKey]:
    """The statistics that a criterion asks for; what it asks of gates is measured by ``gate_gradients``."""
    return [StatisticKey.parse(name) for name in criterion.probes(group.role) if not name.startswith(GATE_PREFIX)]


def statistic_requests(analysis: Analysis, keys: Mapping[str, Sequence[StatisticKey]]) -> list[StatisticRequest]:
    """One request per statistic and activation; ``keys``: group id -> statistics to measure."""
    requests: list[StatisticRequest] = []
    for group in analysis.groups:
        for key in keys.get(group.id, ()):
            for request in requests_of_key(analysis, group, key):
                requests.append(replace(request, output=f"snpc_stat_{len(requests)}"))
    return requests


def requests_of_key(analysis: Analysis, group: Group, key: StatisticKey) -> list[StatisticRequest]:
    """The requests of one statistic, outputs without a name yet."""
    if key.kind == "score_loss":
        products = analysis.weights[group.id].products
        chosen = products if key.use is None else products[key.use : key.use + 1]
        return [score_loss_request(group, key, product) for product in chosen]
    if key.probe == "normalized" and key.consumer is not None and key.use is not None:
        probe = analysis.weights[group.id].normalizations[key.consumer].probes[key.use]
        return [StatisticRequest(group, probe, key, "", columns=probe.units.size // (group.blocks * group.size))]
    if key.consumer is not None and key.use is not None:
        use = analysis.weights[group.id].uses[key.consumer][key.use]
        window = use.node if use.consumer.taps > 1 else None
        return [StatisticRequest(group, use.probe, key, "", window, use.consumer.columns)]
    return [StatisticRequest(group, probe, key, "") for probe in group.probes if probe.kind == key.probe]


def score_loss_request(group: Group, key: StatisticKey, product: Contraction) -> StatisticRequest:
    """The error of the scores of one product."""
    probes = {probe.tensor: probe for probe in group.probes}
    query, partner = probes[product.left.name], probes[product.right.name]
    return StatisticRequest(group, query, key, "", product=product, partner=partner)


def split_by_memory(
    analysis: Analysis, calibration: Calibration, requests: Sequence[StatisticRequest], limit: int
) -> Iterator[tuple[StatisticRequest, ...]]:
    """The requests in parts that take about ``limit`` bytes each to measure, the model itself not counted. The requests
    of a group stay together. Raises UserError where one group takes more."""
    elements = activation_elements(analysis, calibration)
    part: list[StatisticRequest] = []
    for group in {request.group.id: request.group for request in requests}.values():
        of_group = [request for request in requests if request.group is group]
        alone = measurement_bytes(of_group, elements, calibration.batch)
        if alone > limit:
            needed = f"{2 * alone // 1000 + 1}kB" if alone < 10**6 else f"{2 * alone // 10**6 + 1}MB"
            raise UserError(
                f"statistics of {group.id} take about {needed}, more than there is for them: give --memory-limit "
                f"{needed} or more, or a smaller --calib-batch"
            )
        if part and measurement_bytes([*part, *of_group], elements, calibration.batch) > limit:
            yield tuple(part)
            part = []
        part += of_group
    if part:
        yield tuple(part)


def activation_elements(analysis: Analysis, calibration: Calibration) -> dict[str, float]:
    """Tensor -> its estimated number of elements in the largest batch: that of the analysis, scaled like the inputs."""
    sizes = {name: math.prod(shape) for name, shape in analysis.traced_graph.facts.shapes_by_name.items()}
    growth = max(
        (count / max(sizes.get(name, count), 1) for name, count in calibration.max_elements().items()), default=1
    )
    return {name: size * growth for name, size in sizes.items()}


def measurement_bytes(requests: Sequence[StatisticRequest], elements: Mapping[str, float], batch: int) -> int:
    """Estimated memory that measuring these at once takes."""
    offsets = {request.probe.tensor: request.columns if request.window is not None else 1 for request in requests}
    offsets |= {request.partner.tensor: 1 for request in requests if request.partner is not None}
    activations = sum(elements.get(tensor, 0) * count for tensor, count in offsets.items())
    statistics = sum(statistic_elements(request, batch) for request in requests)
    return int(activations * ACTIVATION_BYTES + STATISTIC_BYTES * statistics)


def statistic_elements(request: StatisticRequest, batch: int) -> int:
    """Number of elements of one statistic of one batch."""
    blocks, size, kind = request.group.blocks, request.group.size, request.key.kind
    if kind == "gram_joint":
        return packed_length(size * request.columns + 1)
    if kind == "gram_per_repeat":
        return request.columns * blocks * (size + 1) ** 2
    square = kind in ("gram", "moment", "gram_centered", "score_loss")
    per_sample = kind in ("gram", "energy")
    return blocks * (size * size if square else size + 1) * (batch if per_sample else 1)


def measuring_model(
    analysis: Analysis, requests: Sequence[StatisticRequest], kept: Sequence[str] = ()
) -> tuple[ir.Model, PaddingMasks]:
    """(the model with an output for each statistic and for each value named ``kept``, the masks that it takes)."""
    source, padding = analysis.traced_graph, padding_of(analysis, requests)
    instrument = Instrument(source.model, padding.row_masks)
    return add_requests(instrument, requests, kept, source.facts.types_by_name), padding


def padding_of(analysis: Analysis, requests: Sequence[StatisticRequest]) -> PaddingMasks:
    """The masks of the activations that these requests measure."""
    probes = [
        (probe, request.group.blocks * request.group.size)
        for request in requests
        for probe in (request.probe, request.partner)
        if probe is not None
    ]
    return find_padding(analysis.traced_graph, probe_row_counters(probes))


def add_requests(
    instrument: Instrument, requests: Sequence[StatisticRequest], kept: Sequence[str], types: Mapping[str, ir.DataType]
) -> ir.Model:
    """The instrumented model, with an output for each statistic and for each value named ``kept``."""
    for request in requests:
        request.add_to(instrument)
    instrument.add_values(kept, types)
    return instrument.model


def measure_batches(
    analysis: Analysis,
    requests: Sequence[StatisticRequest],
    batches: Iterable[Feeds],
    *,
    kept: Sequence[str] = (),
    execution: Execution = DEFAULT_EXECUTION,
) -> Iterator[dict[str, AnyArray]]:
    """Run the instrumented model over ``batches``. Yields per batch: output name -> statistic in float32, and the
    values named ``kept``; the caller sums over batches in float64. Padded tokens do not count."""
    model, padding = measuring_model(analysis, requests, kept)
    with (
        token_mask_runner(analysis.traced_graph, padding, execution) as masks,
        temporary_session(model, execution=execution) as run,
    ):
        for feeds in batches:
            try:
                outputs = run({**feeds, **masks(feeds)})
            except UserError as error:
                raise UserError(refused_batch(analysis, feeds, error)) from None
            yield outputs


def refused_batch(analysis: Analysis, feeds: Feeds, error: UserError) -> str:
    """What a user reads where the model does not run on calibration data: some kernels take one sample at a time."""
    name, text = analysis.model.path.name, str(error).removeprefix("model: ")
    several = any(array.ndim > 1 and len(array) > 1 for array in feeds.values())
    advice = "; if it takes one sample at a time, give --calib-batch 1" if several else ""
    return f"{name}: calibration: {text}{advice}"
