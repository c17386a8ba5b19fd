"""Statistics of a model on calibration data: float64 sums, which add up over parts of the data; and their file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from snpc.criteria import Criterion, make_criterion
from snpc.errors import UserError
from snpc.passes import Analysis
from snpc.passes.weights import closed_form_kinds
from snpc.planning import PruningMethod
from snpc.runtime.batches import (
    DenseValues,
    DistributedBatchValues,
    add_up,
    check_runs_whole,
    must_stream,
    unpacked_size,
)
from snpc.runtime.calibration import Calibration, DataPart
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Advance,
    Execution,
    SpillableStore,
    ignore_advance,
    memory_budget,
)
from snpc.runtime.io import NOT_STORED, StageEntry, StoredStage, atomic_write
from snpc.runtime.statistics.distributed_measure import (
    StatisticObserver,
    measure_on_workers,
    statistic_observer,
)
from snpc.runtime.statistics.gate_gradients import needs_gate_gradients, observe_gate_gradients
from snpc.runtime.statistics.measure import (
    StatisticRequest,
    criterion_keys,
    measure_batches,
    split_by_memory,
    statistic_requests,
)
from snpc.runtime.statistics.moments import required_statistics
from snpc.runtime.statistics.padding import find_padding, probe_row_counters
from snpc.runtime.statistics.rows import SampledRows, choose_strides, seen_shares
from snpc.runtime.statistics.streamed_measure import StreamedMeasurement
from snpc.types import AnyArray, FloatArray, Group

SEGMENTS_ENTRY = "segments"  # where the segments end that a model was cut into
SUM_BYTES = 256 << 20  # of each half's sums that stay in memory after the pass
STATISTICS_FORMAT = 5  # 1 held whole squares, 2 other names for closed forms, 3 no parts of data, 4 no halves
StatisticSums = Mapping[str, Mapping[str, FloatArray]]


@dataclass(frozen=True)
class Statistics:
    """``sums``: group id -> name of a statistic -> its sum over ``samples`` calibration samples.

    ``odd``: those of "gram_joint" over every other batch, in float32, so that one half of the samples can judge what is
    fitted to the other; empty where there was one batch. ``seen``: group id -> the share of the rows (tokens) that
    these were summed over, weighted up to all of them; groups whose rows all count are left out.

    Groups with a closed form have the statistics of ``moments.required_statistics``, named by the text of their
    ``StatisticKey``; the others have what ``criterion`` observes. ``digest`` and ``model`` identify the model,
    ``sources`` the data; ``parts`` are of data that is not there whole yet. Two values add up if the same was measured
    of the same model, else ``+`` raises UserError.
    """

    model: str
    digest: str
    criterion: str
    samples: int
    sources: tuple[str, ...]
    sums: StatisticSums = field(repr=False)
    parts: tuple[DataPart, ...] = ()
    odd: StatisticSums = field(default_factory=dict, repr=False)
    seen: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        if self.digest != other.digest:
            raise UserError(
                f"statistics of {self.model} (digest {self.digest[:12]}) and of {other.model} ({other.digest[:12]}) do "
                "not add up: give those of one model"
            )
        if statistic_shapes(self) != statistic_shapes(other) or self.criterion != other.criterion:
            raise UserError(
                f"statistics on {self.describe_sources()} and on {other.describe_sources()} are not of the same groups "
                "and criterion: measure both with the same --roles, --include, --exclude, --method and --criterion"
            )
        repeated = sorted(part.describe() for part in {*self.parts} & {*other.parts})
        if repeated:
            raise UserError(f"statistics on {repeated[0]} are given twice: give each part once")
        sums = {
            group: {name: array + other.sums[group][name] for name, array in arrays.items()}
            for group, arrays in self.sums.items()
        }
        whole, parts = completed_parts(self.parts + other.parts)
        sources = self.sources + other.sources + whole
        seen = {
            group: row_share(self, other, group) for group in self.sums if group in self.seen or group in other.seen
        }
        return replace(
            self,
            samples=self.samples + other.samples,
            sources=sources,
            sums=sums,
            parts=parts,
            odd=add_halves(self, other),
            seen=seen,
        )

    @property
    def sampled_rows(self) -> tuple[SampledRows, ...]:
        """Where not all rows were summed: from how many, by size."""
        found: Counter[tuple[int, int, int]] = Counter()
        for group, share in self.seen.items():
            joint = [array for name, array in self.sums[group].items() if has_halves(name)]
            rows = max(float(array[-1]) for array in joint)
            columns = max(unpacked_size(len(array)) or 1 for array in joint) - 1
            found[columns, round(share * rows), round(rows)] += 1
        return tuple(SampledRows(number, *what) for what, number in sorted(found.items()))

    def describe_sources(self) -> str:
        """The calibration data, in words."""
        return " and ".join([*self.sources, *(part.describe() for part in self.parts)])


def completed_parts(parts: Sequence[DataPart]) -> tuple[tuple[str, ...], tuple[DataPart, ...]]:
    """(the data whose parts are all there, the other parts)."""
    found = Counter((part.origin, part.count) for part in parts)
    whole = [(origin, count) for (origin, count), number in found.items() if number == count]
    rest = [part for part in parts if (part.origin, part.count) not in whole]
    return tuple(origin for origin, _ in whole), tuple(sorted(rest, key=lambda part: part.index))


def add_halves(first: Statistics, second: Statistics) -> StatisticSums:
    """The odd half of the sum. Of two values without halves, the second is one."""
    if not first.odd and not second.odd:
        return {
            group: {name: array.astype(np.float32) for name, array in arrays.items() if has_halves(name)}
            for group, arrays in second.sums.items()
        }
    groups = {**first.odd, **second.odd}
    return {
        group: {
            name: np.sum([s.odd[group][name] for s in (first, second) if group in s.odd], axis=0)
            for name in groups[group]
        }
        for group in groups
    }


def row_share(first: Statistics, second: Statistics, group: str) -> float:
    """The share of rows that the sum of two values has seen, by samples."""
    return sum(s.samples * s.seen.get(group, 1.0) for s in (first, second)) / (first.samples + second.samples)


def has_halves(name: str) -> bool:
    """Whether halves of a statistic are kept apart."""
    return name.startswith("gram_joint:")


def statistic_shapes(statistics: Statistics) -> dict[tuple[str, str], tuple[int, ...]]:
    """(group id, name of a statistic) -> shape of its sum."""
    return {(group, name): a.shape for group, arrays in statistics.sums.items() for name, a in arrays.items()}


def measure_statistics(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    *,
    method: PruningMethod = "auto",
    criterion: str | Criterion = "mixed",
    dense: DenseValues | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Statistics:
    """Measure what pruning these groups takes: the sums of the closed forms, and for groups without one (with method
    "select": for all) what ``criterion`` asks for.

    One pass over the data measures as many groups as fit into ``execution.memory_limit`` bytes; the limit changes sums
    by rounding only. ``dense`` takes the values of the dense model that it names. Raises UserError where the limit is
    too small for a single group.
    """
    stage = NOT_STORED
    if execution.work is not None:
        named = (analysis.identity, [g.id for g in groups], method, criterion, dense.names if dense is not None else ())
        stage = execution.stored_stage("statistics", *named, calibration.identity)
    stored = stage.get("all")
    if stored is not None and (dense is None or execution.executor is not None or restored(dense, stage, calibration)):
        return statistics_from(stored.record, stored.arrays)
    statistics = run_measurement(analysis, calibration, groups, method, criterion, execution, dense, stage)
    if not is_streamed(analysis, execution, stage):  # else each segment is stored, and a second copy would be large
        if dense is not None and dense.batches:
            dense.keep_in(stage)
        stage.put("all", statistics_header(statistics), statistics_arrays(statistics))
    return statistics


def is_streamed(analysis: Analysis, execution: Execution, stage: StoredStage = NOT_STORED) -> bool:
    """Whether statistics are measured segment after segment: where memory is short, and where it was for an earlier run
    that left its segments in ``stage``. Workers run whole models."""
    if execution.executor is not None:
        return False
    return must_stream(analysis.traced_graph.model, execution) or stage.get(SEGMENTS_ENTRY) is not None


def restored(dense: DenseValues, stage: StoredStage, calibration: Calibration) -> bool:
    """Take the dense model's values that were stored, where any are wanted."""
    return not dense.names or dense.restore(stage, len(calibration.batch_plan))


def run_measurement(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    method: PruningMethod,
    criterion: str | Criterion,
    execution: Execution,
    dense: DenseValues | None = None,
    stage: StoredStage = NOT_STORED,
) -> Statistics:
    """``measure_statistics`` where not all is stored. ``stage`` has what segments left."""
    judge = make_criterion(criterion) if isinstance(criterion, str) else criterion
    kinds = {} if method == "select" else closed_form_kinds(analysis.weights, groups)
    keys = {
        g.id: required_statistics(analysis.weights[g.id]) if g.id in kinds else criterion_keys(judge, g) for g in groups
    }
    gated = [g for g in groups if g.id not in kinds and needs_gate_gradients(judge, g)]
    if gated:
        subject = f"{analysis.name}: criterion {judge.name} takes gradients of"
        check_runs_whole(analysis.traced_graph.model, execution, subject, "choose the criterion mixed")
    requests = statistic_requests(analysis, keys)
    masked = find_padding(
        analysis.traced_graph, probe_row_counters((r.probe, r.group.blocks * r.group.size) for r in requests)
    ).row_masks
    requests = choose_strides(analysis, calibration, requests, masked)
    streamed = is_streamed(analysis, execution, stage)
    budget = memory_budget(execution.memory_limit)
    totals = StatisticAccumulator(
        frozenset(kinds), judge, SpillableStore(min(SUM_BYTES, budget // 4) if streamed else budget // 2)
    )
    if streamed:
        entry = stage.get(SEGMENTS_ENTRY)
        known = entry.record if entry is not None else ()
        measurement = StreamedMeasurement(analysis, calibration, requests, kinds, dense, execution, known)
        stage.put(SEGMENTS_ENTRY, [part.segment.last for part in measurement.segments])
        measure_segments(measurement, totals, stage)
    else:
        passes = list(split_by_memory(analysis, calibration, requests, budget // 2))
        with execution.progress.stage("statistics", len(passes) * len(calibration.batch_plan)) as advance:
            measure = measure_passes if execution.executor is None else measure_passes_on_workers
            measure(analysis, calibration, passes, totals, dense, execution, advance)
    if gated:
        roles = {g.id: g.role for g in gated}
        observe_gate_gradients(
            analysis,
            calibration,
            gated,
            judge,
            lambda name, arrays: totals.add_observation(name, judge.observe(roles[name], arrays)),
            execution,
        )
    spelled = criterion if isinstance(criterion, str) else judge.name
    samples = calibration.samples if requests or gated else 0
    part = calibration.part
    sources = (calibration.origin,) if part is None else ()
    parts = (part,) if part is not None else ()
    return Statistics(
        analysis.name,
        analysis.digest,
        spelled,
        samples,
        sources,
        totals.sums if streamed else moved_out(totals.sums),
        parts,
        totals.odd if streamed else moved_out(totals.odd),
        dict(seen_shares(requests)),
    )


def measure_passes(
    analysis: Analysis,
    calibration: Calibration,
    passes: Sequence[Sequence[StatisticRequest]],
    totals: StatisticAccumulator,
    dense: DenseValues | None,
    execution: Execution,
    advance: Advance,
) -> None:
    """Measure in this process: the requests of one pass after those of the other."""
    kept = dense.names if dense is not None else ()
    for requests in passes:
        observer = totals.observer(requests)
        results = measure_batches(analysis, requests, calibration.batches(), kept=kept, execution=execution)
        for number, result in enumerate(results):
            totals.add_batch(observer, result, calibration, number)
            if dense is not None:
                dense.put(number, {name: result[name] for name in kept})
            advance(1)
        kept = ()


def measure_segments(measurement: StreamedMeasurement, totals: StatisticAccumulator, stage: StoredStage) -> None:
    """Measure segment after segment. ``stage``: segments that an earlier run has finished are not run again, and others
    are stored as they finish."""
    calibration = measurement.calibration
    known = stored_segments(measurement, stage)
    if not known:
        measurement.begin()
    total = sum(measurement.steps(part) for part in measurement.segments)
    with measurement.execution.progress.stage("statistics", total) as advance:
        for index, part in enumerate(measurement.segments):
            found = totals.like()

            def observe(
                requests: Sequence[StatisticRequest],
                number: int,
                outputs: Mapping[str, AnyArray],
                found: StatisticAccumulator = found,
            ) -> None:
                found.add_batch(found.observer(requests), outputs, calibration, number)

            if index < len(known):
                found.fill(known[index])
                advance(measurement.steps(part))
            else:
                measurement.measure(part, observe, advance)
                measurement.keep_in(stage, index)
                entries = list(statistic_entries(found))
                names = [(half, group, name) for half, group, name, _ in entries]
                stage.put(f"sums of {part.name}", names, {str(k): array for k, (*_, array) in enumerate(entries)})
            totals.merge(found)


def measure_dense_values(analysis: Analysis, dense: DenseValues, execution: Execution) -> None:
    """Let ``dense`` take its values from a pass over its data, segment after segment."""
    measurement = StreamedMeasurement(analysis, dense.calibration, (), (), dense, execution)
    measurement.begin()
    for part in measurement.segments:
        measurement.measure(part, observe_nothing, ignore_advance)


def observe_nothing(requests: Sequence[StatisticRequest], number: int, outputs: Mapping[str, AnyArray]) -> None:
    """Nothing is asked for."""


def stored_segments(measurement: StreamedMeasurement, stage: StoredStage) -> list[StageEntry]:
    """The sums of the segments that were finished before; the batches are brought behind them."""
    known: list[StageEntry] = []
    for part in measurement.segments:
        entry = stage.get(f"sums of {part.name}")
        if entry is None:
            break
        known.append(entry)
    return known if known and measurement.restore(stage, len(known)) else []


def measure_passes_on_workers(
    analysis: Analysis,
    calibration: Calibration,
    passes: Sequence[Sequence[StatisticRequest]],
    totals: StatisticAccumulator,
    dense: DenseValues | None,
    execution: Execution,
    advance: Advance,
) -> None:
    """The same on the workers of ``execution.executor``. ``dense`` stays with them."""
    assert execution.executor is not None
    values = DistributedBatchValues(calibration, execution.executor, execution)
    for number, requests in enumerate(passes):
        first = dense if number == 0 else None
        sums, odd = measure_on_workers(analysis, values, requests, totals.observer(requests), first, advance)
        for group, arrays in sums.items():
            totals.add_observation(group, arrays)
            totals.add_half(group, odd.get(group, {}))
    if dense is not None and passes:
        dense.on_workers = values
    else:
        values.close()


def moved_out(sums: dict[str, dict[str, FloatArray]]) -> dict[str, dict[str, FloatArray]]:
    """The same with what is beyond ``SUM_BYTES`` in files: it is read once or twice more, group by group."""
    store = SpillableStore(SUM_BYTES)
    for arrays in sums.values():
        for name in list(arrays):
            arrays[name] = store.keep(arrays[name])
    return sums


class StatisticAccumulator:
    """Sums over batches. Of groups that are not in ``closed`` it sums what ``criterion`` observes."""

    def __init__(self, closed: Collection[str], criterion: Criterion, store: SpillableStore) -> None:
        self.closed = closed
        self.criterion = criterion
        self.store = store
        self.sums: dict[str, dict[str, FloatArray]] = {}
        self.odd: dict[str, dict[str, FloatArray]] = {}

    def observer(self, requests: Iterable[StatisticRequest]) -> StatisticObserver:
        """What makes of a batch that these requests measured the arrays that are added up."""
        return statistic_observer(requests, frozenset(self.closed), self.criterion)

    def add_batch(
        self, observer: StatisticObserver, outputs: Mapping[str, AnyArray], calibration: Calibration, number: int
    ) -> None:
        """Add what was measured of the batch of this number."""
        for group, observed in observer.observe(outputs, calibration, number).items():
            self.add_observation(group, observed)
            if number % 2 == 1:
                self.add_half(group, observed)

    def like(self) -> StatisticAccumulator:
        """An empty one, which keeps its arrays in the same place."""
        return StatisticAccumulator(self.closed, self.criterion, self.store)

    def fill(self, entry: StageEntry) -> None:
        """Take sums that were stored."""
        for k, (half, group, name) in enumerate(entry.record):
            sums = self.sums if half == "both" else self.odd
            sums.setdefault(group, {})[name] = self.store.keep(np.array(entry.arrays[str(k)]))

    def merge(self, other: StatisticAccumulator) -> None:
        """Add the sums of another one, which is not used any more."""
        for sums, more in ((self.sums, other.sums), (self.odd, other.odd)):
            for group, arrays in more.items():
                known = sums.setdefault(group, {})
                for name, array in arrays.items():
                    known[name] = np.add(known[name], array, out=known[name]) if name in known else array

    def add_half(self, group_id: str, arrays: Mapping[str, AnyArray]) -> None:
        """Add a batch of the odd half, or several."""
        for name in filter(has_halves, arrays) if group_id in self.closed else ():
            half = self.odd.setdefault(group_id, {})
            if name in half:
                half[name] += arrays[name]
            else:
                half[name] = self.store.keep(np.array(arrays[name], np.float32))

    def add_observation(self, name: str, observed: Mapping[str, AnyArray]) -> None:
        total = self.sums.setdefault(name, {})
        for key, array in observed.items():
            if key in total:
                add_up(total, key, array)
            else:
                total[key] = self.store.keep(np.array(array, np.float64))


# -- the file --------------------------------------------------------------------------------------------------------


def save_statistics(statistics: Statistics, path: Path | str) -> None:
    """Write one .npz, whole or not at all. Its entry ``header`` is JSON; the other entries, "0", "1" and so on, are the
    sums that the header names by half ("both" or "odd"), group and statistic."""
    header = np.array(json.dumps(statistics_header(statistics)))
    with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, header=header, **statistics_arrays(statistics))  # type: ignore[arg-type]


def statistics_header(statistics: Statistics) -> dict[str, Any]:
    """What a file of statistics says beside the sums."""
    return {
        "snpc_statistics": STATISTICS_FORMAT,
        "model": statistics.model,
        "digest": statistics.digest,
        "criterion": statistics.criterion,
        "samples": statistics.samples,
        "sources": list(statistics.sources),
        "parts": [astuple(part) for part in statistics.parts],
        "seen": dict(statistics.seen),
        "entries": [(half, group, name) for half, group, name, _ in statistic_entries(statistics)],
    }


def statistic_entries(statistics: Statistics | StatisticAccumulator) -> Iterator[tuple[str, str, str, AnyArray]]:
    """(half, group id, name, sum) of every sum: of "both" halves, or of the "odd" one."""
    for half, sums in (("both", statistics.sums), ("odd", statistics.odd)):
        for group, arrays in sums.items():
            for name, array in arrays.items():
                yield half, group, name, array


def statistics_arrays(statistics: Statistics) -> dict[str, AnyArray]:
    """The sums, numbered as the header lists them."""
    return {str(k): array for k, (*_, array) in enumerate(statistic_entries(statistics))}


def statistics_from(header: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> Statistics:
    """The statistics that ``statistics_header`` and ``statistics_arrays`` describe. Raises ValueError, KeyError or
    TypeError where they describe none."""
    if header["snpc_statistics"] != STATISTICS_FORMAT:
        raise ValueError("another version of snpc wrote it; measure again")
    sums: dict[str, dict[str, dict[str, FloatArray]]] = {"both": {}, "odd": {}}
    for k, (half, group, name) in enumerate(header["entries"]):
        array = check_finite(arrays[str(k)], np.float64 if half == "both" else np.float32)
        check_squares(array, str(name))
        sums[half].setdefault(str(group), {})[str(name)] = array
    check_halves(sums["both"], sums["odd"])
    return Statistics(
        str(header["model"]),
        str(header["digest"]),
        str(header["criterion"]),
        int(header["samples"]),
        tuple(map(str, header["sources"])),
        sums["both"],
        tuple(DataPart(str(origin), int(index), int(count)) for origin, index, count in header["parts"]),
        sums["odd"],
        {str(group): float(share) for group, share in header["seen"].items()},
    )


def load_statistics(path: Path | str, *more: Path | str) -> Statistics:
    """Read a file that ``save_statistics`` wrote; of several files, the sum.

    Raises UserError where a file holds no statistics, or where they do not add up.
    """
    statistics = read_statistics(Path(path))
    for other in more:
        statistics = statistics + read_statistics(Path(other))
    return statistics


def read_statistics(path: Path) -> Statistics:
    """The statistics of one file. Raises UserError where it holds none."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return statistics_from(json.loads(str(archive["header"])), archive)
    except Exception as error:  # zipfile, numpy and json fail in many ways on a broken file; all mean the same
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:150]
        raise UserError(f"{path}: holds no statistics ({reason}): give a file that --save-stats wrote") from None


def check_finite(array: AnyArray, dtype: type[np.floating[Any]]) -> FloatArray:
    """The array. Raises ValueError where it is not made of finite numbers of this type."""
    if array.dtype != dtype or not np.isfinite(array).all():
        raise ValueError(f"its sums are not all finite {dtype.__name__} numbers")
    return array


def check_halves(sums: StatisticSums, odd: StatisticSums) -> None:
    """Raise ValueError where a half is of a statistic that is not there, or of another shape."""
    for group, arrays in odd.items():
        for name, array in arrays.items():
            if array.shape != sums.get(group, {}).get(name, np.zeros(0)).shape:
                raise ValueError(f"a half of {name} of {group} is not of its shape; measure again")


def check_squares(sums: FloatArray, name: str) -> None:
    """Raise ValueError where sums of squares are negative, which no data gives."""
    if sums.ndim >= 2 and sums.shape[-1] == sums.shape[-2] and np.einsum("...aa->...a", sums).min(initial=0) < 0:
        raise ValueError(f"{name} holds negative sums of squares; measure again")


def check_statistics_match(statistics: Statistics, analysis: Analysis) -> None:
    """Raise UserError where the statistics are not of this model."""
    if statistics.digest != analysis.digest:
        raise UserError(
            f"the statistics are of another model ({statistics.model}, digest {statistics.digest[:12]}), not of "
            f"{analysis.name} ({analysis.digest[:12]}): measure this one (--calib, --save-stats)"
        )
