"""Statistics measured by the workers of an executor, each on its share of the batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snpc.criteria import Criterion
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph
from snpc.runtime.batches import BatchProgram, DenseValues, DistributedBatchValues, dense_name
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Advance
from snpc.runtime.statistics.measure import StatisticRequest, measuring_model
from snpc.runtime.statistics.padding import PaddingMasks, masking_model
from snpc.types import AnyArray, FloatArray, Role

GroupSums = dict[str, dict[str, FloatArray]]
SEPARATOR = "\n"  # between group and statistic in the name of a sum; no statistic has one


@dataclass(frozen=True)
class MeasuredOutput:
    """What an output of the instrumented model measures."""

    group: str
    role: Role
    statistic: str
    output: str


@dataclass(frozen=True)
class StatisticObserver:
    """From the outputs on one batch to what is added up: for groups in ``closed`` the statistics themselves, for
    others what ``criterion`` observes. It knows nothing of graphs, so that it can be sent to a worker."""

    measured: tuple[MeasuredOutput, ...]
    closed: frozenset[str]
    criterion: Criterion

    def __call__(self, outputs: Mapping[str, AnyArray], calibration: Calibration, number: int) -> dict[str, AnyArray]:
        """``number``: of the batch in ``calibration``. The sums are named by group and statistic."""
        observed = self.observe(outputs, calibration, number)
        return {f"{group}{SEPARATOR}{name}": a for group, arrays in observed.items() for name, a in arrays.items()}

    def observe(
        self, outputs: Mapping[str, AnyArray], calibration: Calibration, number: int
    ) -> dict[str, Mapping[str, AnyArray]]:
        """Group id -> arrays by statistic."""
        batch: dict[str, dict[str, AnyArray]] = defaultdict(dict)
        roles = {entry.group: entry.role for entry in self.measured}
        for entry in self.measured:
            array, arrays = outputs[entry.output], batch[entry.group]
            check_finite_batch(array, entry.group, calibration, number)
            several = same_shape(arrays.get(entry.statistic), array)
            arrays[entry.statistic] = np.add(arrays[entry.statistic], array, dtype=np.float64) if several else array
        return {
            group: arrays if group in self.closed else observe_roles(self.criterion, roles[group], arrays)
            for group, arrays in batch.items()
        }


def observe_roles(criterion: Criterion, role: Role, arrays: Mapping[str, AnyArray]) -> Mapping[str, FloatArray]:
    return criterion.observe(role, {key: np.asarray(array, np.float64) for key, array in arrays.items()})


def same_shape(first: AnyArray | None, second: AnyArray) -> bool:
    return first is not None and first.shape == second.shape


def check_finite_batch(array: AnyArray, group: str, calibration: Calibration, number: int) -> None:
    """Raise UserError where what is summed over batch ``number`` is not finite: a sum would hide where."""
    if not np.isfinite(array).all():
        raise UserError(
            f"{calibration.source}: {calibration.batch_text(number)}, activations of {group} are not finite, or too "
            "large to be squared: look for extreme values in these samples and for NaN in the model's weights, or "
            "leave the group out (--exclude)"
        )


def statistic_observer(
    requests: Iterable[StatisticRequest], closed: frozenset[str], criterion: Criterion
) -> StatisticObserver:
    measured = tuple(MeasuredOutput(r.group.id, r.group.role, str(r.key), r.output) for r in requests)
    return StatisticObserver(measured, closed, criterion)


def measure_on_workers(
    analysis: Analysis,
    values: DistributedBatchValues,
    requests: Sequence[StatisticRequest],
    observer: StatisticObserver,
    dense: DenseValues | None,
    advance: Advance,
) -> tuple[GroupSums, GroupSums]:
    """(the sums over all batches, those over the odd ones), each by group id and name of a statistic. ``dense`` names
    what the workers keep of the dense model besides."""
    kept = dense.names if dense is not None else ()
    model, padding = measuring_model(analysis, requests, kept)
    keep_token_masks(values, analysis.traced_graph, padding)
    names = {name: dense_name(name) for name in kept}
    program = BatchProgram(model, kept=names, observe=observer)
    try:
        found = values.run(program, advance)
    except UserError as error:
        if not str(error).startswith("model: "):
            raise
        raise UserError(f"{analysis.model.path.name}: calibration: {str(error).removeprefix('model: ')}") from None
    return by_group({name: found.total(name) for name in found.even}), by_group(found.odd)


def by_group(sums: Mapping[str, FloatArray]) -> GroupSums:
    """By the two parts of their names."""
    nested: GroupSums = defaultdict(dict)
    for name, array in sums.items():
        group, _, statistic = name.rpartition(SEPARATOR)
        nested[group][statistic] = array
    return nested


def keep_token_masks(values: DistributedBatchValues, traced_graph: TracedGraph, padding: PaddingMasks) -> None:
    """Let every batch keep the masks of ``padding``: bool [batch, tokens], does the token count?"""
    if padding.sources:
        values.run(BatchProgram(masking_model(traced_graph, padding), derive=padding.reading))
