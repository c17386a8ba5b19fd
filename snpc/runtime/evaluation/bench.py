"""Latency of models, measured side by side.

Models are timed in rounds: every model runs once in a round, on the same inputs, and the order rotates from round to
round. A load on the machine then slows all of them; a speed-up is the median over rounds of

    ratio = time of the first model / time of the other model,  both in the same round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    ENGINE_SUFFIXES,
    OPENVINO_SUFFIX,
    TIMING_STAGE,
    Advance,
    Execution,
    RandomInputs,
    Runner,
    available_cores,
    check_feeds,
    cpu_name,
    ignore_advance,
    open_runner,
)
from snpc.runtime.io import load
from snpc.types import AnyArray, Feeds, FloatArray, Shape, TensorSpec, shape_text

TimedCall = Callable[[], object]

MAX_FEEDS = 16  # kept in memory; rounds use them in turn
BOOTSTRAP_RESAMPLES = 2000
CONFIDENCE_PERCENT = 95  # per cent, of the bootstrap interval


@dataclass(frozen=True)
class Timing:
    """One model's times in ms; ``percentiles``: (percent, ms)."""

    model: str
    median: float
    mean: float
    min: float
    percentiles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class OutputDiff:
    """Largest absolute difference of an output on the first feed; None with a ``reason`` where it is undefined."""

    name: str
    max_abs: float | None
    reason: str = ""


@dataclass(frozen=True)
class Speedup:
    """How many times faster ``model`` is than ``base``, the first model.

    ``ratio`` is the median of the rounds' ratios, ``q1``/``q3`` their quartiles (the spread of one round), and
    ``low``/``high`` the bootstrap 95 % interval of the median. The interval assumes independent rounds: it is too
    narrow on a machine whose load changes slowly.
    """

    model: str
    base: str
    ratio: float
    low: float
    high: float
    q1: float
    q3: float
    outputs: tuple[OutputDiff, ...]

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1

    @property
    def largest_difference(self) -> OutputDiff | None:
        """The comparable output that differs most."""
        known = [diff for diff in self.outputs if diff.max_abs is not None]
        return max(known, key=lambda diff: diff.max_abs or 0.0, default=None)


@dataclass(frozen=True)
class Machine:
    """The machine and runtimes of a measurement. ``provider``: providers or devices, ``runtime``: names and versions,
    both joined by commas. ``threads``: the setting, 0: the runtime chose."""

    provider: str
    threads: int
    cpu: str
    cores: int
    runtime: str


@dataclass(frozen=True)
class BenchResult:
    """A measurement. ``shapes``: of the first feed; ``feeds``: number of feeds that the rounds used in turn."""

    timings: tuple[Timing, ...]
    speedups: tuple[Speedup, ...]
    machine: Machine
    shapes: Mapping[str, Shape]
    feeds: int
    warmup: int
    rounds: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; times in ms, percentiles as {"p99": ms}."""
        report = asdict(self)
        for timing in report["timings"]:
            timing["percentiles"] = {f"p{percent:g}": ms for percent, ms in timing["percentiles"]}
        for speedup in report["speedups"]:
            speedup["outputs"] = list(speedup["outputs"])
        report.update(timings=list(report["timings"]), speedups=list(report["speedups"]))
        report["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return report

    def rows(self) -> list[tuple[str, ...]]:
        """A table as text: the header, then one row per model. Without p50, which is the median."""
        percents = [percent for percent, _ in self.timings[0].percentiles if percent != 50]
        header = ("model", "median ms", "mean", "min", *(f"p{percent:g}" for percent in percents))
        compared = ("speed-up", f"{CONFIDENCE_PERCENT} %", "quartiles", "max |diff|") if self.speedups else ()
        by_position = [None, *self.speedups]
        rows = [
            (*_timing_cells(timing, percents), *_speedup_cells(speedup))
            for timing, speedup in zip(self.timings, by_position, strict=True)
        ]
        return [(*header, *compared), *(row[: len(header) + len(compared)] for row in rows)]


@dataclass(frozen=True)
class TimingProtocol:
    """How long is measured.

    ``warmup``: rounds that do not count. ``iterations``: rounds that count, and more until ``duration`` seconds have
    passed. ``percentiles``: those of a model's times that are told. Raises UserError for what cannot be measured.
    """

    warmup: int = 5
    iterations: int = 50
    duration: float | None = None
    percentiles: tuple[float, ...] = (50, 90, 99)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup < 0 or (self.duration is not None and self.duration < 0):
            raise UserError(
                f"iterations {self.iterations}, warmup {self.warmup}, duration {self.duration}: at least 1 round, "
                "none of them negative"
            )
        for percent in self.percentiles:
            if not 0 <= percent <= 100:
                raise UserError(f"percentile {percent:g} is not in [0, 100]")


ONE_RANDOM_SAMPLE = RandomInputs()
DEFAULT_PROTOCOL = TimingProtocol()


def bench(
    paths: Sequence[Path | str],
    data: RandomInputs | Feeds | Iterable[Feeds] = ONE_RANDOM_SAMPLE,
    *,
    protocol: TimingProtocol = DEFAULT_PROTOCOL,
    execution: Execution = DEFAULT_EXECUTION,
) -> BenchResult:
    """Time the models in turn and compare each with the first.

    ``data``: random inputs of these sizes, one feed, or several (the first 16 are used). First, each model runs
    once on the first feed, for the outputs that are compared. Past keys and values may be narrower in some models,
    which get the first columns. UserError: a model that does not load or run, models with different inputs, or sizes
    that no input can have.
    """
    if not paths:
        raise UserError("no model to time: name at least one ONNX file")
    files = [Path(path) for path in paths]
    labels = _model_labels(files)
    runners = [open_runner(path, execution=execution) for path in execution.track("loading", files, len(files))]
    own = inputs_with_cache_widths(files, [runner.inputs for runner in runners])
    inputs = common_inputs(labels, own)
    feeds, seed = _read_feeds(inputs, data), data.seed if isinstance(data, RandomInputs) else 0
    own_feeds = [[narrow_past(feed, specs) for feed in feeds] for specs in own]
    outputs = [runner.run(feeds_of[0]) for runner, feeds_of in zip(runners, own_feeds, strict=True)]
    calls = [[runner.prepare(feed) for feed in feeds_of] for runner, feeds_of in zip(runners, own_feeds, strict=True)]
    warming = protocol.warmup / max(protocol.iterations, 1)
    with execution.progress.stage(TIMING_STAGE, 1.0 + warming) as advance:
        run_rounds(calls, iterations=protocol.warmup, advance=lambda share: advance(warming * share))
        times = run_rounds(calls, iterations=protocol.iterations, duration=protocol.duration, advance=advance) * 1e3
    return BenchResult(
        timings=tuple(summarize_times(label, times[:, m], protocol.percentiles) for m, label in enumerate(labels)),
        speedups=tuple(
            summarize_ratios(
                labels[m], labels[0], times[:, 0] / times[:, m], compare_outputs(outputs[0], outputs[m]), seed=seed
            )
            for m in range(1, len(labels))
        ),
        machine=_describe_machine(runners),
        shapes={name: tuple(array.shape) for name, array in feeds[0].items()},
        feeds=len(feeds),
        warmup=protocol.warmup,
        rounds=len(times),
        seed=seed,
    )


def run_rounds(
    calls: Sequence[Sequence[TimedCall]],
    *,
    iterations: int,
    duration: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    advance: Advance = ignore_advance,
) -> FloatArray:
    """[rounds, models] seconds of ``calls[model][feed]``, all models once per round, each round on one feed.

    ``advance`` is called between rounds with the
    fraction of all of them that was done.
    """
    models = len(calls)
    times: list[list[float]] = []
    began, done = clock(), 0.0
    while len(times) < iterations or (duration is not None and clock() - began < duration):
        round_number = len(times)
        spent = [0.0] * models
        for model in round_order(models, round_number):
            # The feed changes once per full rotation, so that every feed is run in every order.
            call = calls[model][round_number // models % len(calls[model])]
            start = clock()
            output = call()
            spent[model] = clock() - start
            del output  # freed here: not within the next model's time
        times.append(spent)
        shares = [len(times) / max(iterations, 1), *([(clock() - began) / duration] if duration else [])]
        before, done = done, min(1.0, *shares)
        advance(done - before)
    return np.array(times, dtype=np.float64).reshape(-1, models)


def round_order(models: int, round_number: int) -> list[int]:
    """``round_order(3, 1)`` -> [1, 2, 0]: every model is first, last and in between equally often."""
    return [(round_number + position) % models for position in range(models)]


def summarize_times(model: str, times: FloatArray, percentiles: Sequence[float]) -> Timing:
    """[rounds] ms -> its summary; percentiles interpolate linearly between neighbors."""
    return Timing(
        model=model,
        median=float(np.median(times)),
        mean=float(np.mean(times)),
        min=float(np.min(times)),
        percentiles=tuple((float(percent), float(np.percentile(times, percent))) for percent in percentiles),
    )


def summarize_ratios(
    model: str, base: str, ratios: FloatArray, outputs: tuple[OutputDiff, ...], *, seed: int = 0
) -> Speedup:
    """[rounds] ratios -> their median, its interval and their quartiles."""
    low, high = median_interval(ratios, seed=seed)
    q1, ratio, q3 = np.percentile(ratios, (25, 50, 75))
    return Speedup(model, base, float(ratio), low, high, float(q1), float(q3), outputs)


def median_interval(values: FloatArray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the median of ``values``, from 2000 seeded resamples."""
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(values))  # resamples at a time: long runs have many rounds
    medians = [
        np.median(values[rng.integers(0, len(values), (min(rows, BOOTSTRAP_RESAMPLES - start), len(values)))], axis=1)
        for start in range(0, BOOTSTRAP_RESAMPLES, rows)
    ]
    low, high = np.percentile(np.concatenate(medians), ((100 - CONFIDENCE_PERCENT) / 2, (100 + CONFIDENCE_PERCENT) / 2))
    return float(low), float(high)


def compare_outputs(first: Feeds, other: Feeds) -> tuple[OutputDiff, ...]:
    """One entry per output name of either model, in the order of the first. Nothing is refused here."""
    return tuple(
        _output_diff(name, first[name], other[name])
        if name in first and name in other
        else OutputDiff(name, None, f"only the {'first' if name in first else 'other'} model has it")
        for name in dict.fromkeys([*first, *other])
    )


def inputs_with_cache_widths(
    paths: Sequence[Path], inputs: Sequence[tuple[TensorSpec, ...]]
) -> list[tuple[TensorSpec, ...]]:
    """``inputs`` of the models; where one names the width of a cache and another has a number, as the graph has it."""
    names = {
        spec.name for specs in inputs for spec in specs if is_cache_input(spec) and isinstance(spec.shape[-1], int)
    }
    return [
        load(path).inputs
        if any(spec.name in names and isinstance(spec.shape[-1], str) for spec in specs)
        and path.suffix not in (OPENVINO_SUFFIX, *ENGINE_SUFFIXES)
        else specs
        for path, specs in zip(paths, inputs, strict=True)
    ]


def is_cache_input(spec: TensorSpec) -> bool:
    """Does an input hold past keys or values, [.., tokens, width]?"""
    return "past" in spec.name.lower() and len(spec.shape) > 3


def narrow_past(feed: Feeds, specs: Sequence[TensorSpec]) -> dict[str, AnyArray]:
    """``feed`` with as many columns of past keys and values as a model takes."""
    widths = {spec.name: spec.shape[-1] for spec in specs if is_cache_input(spec) and isinstance(spec.shape[-1], int)}
    return {name: array[..., : widths[name]] if name in widths else array for name, array in feed.items()}


def common_inputs(labels: Sequence[str], inputs: Sequence[Sequence[TensorSpec]]) -> tuple[TensorSpec, ...]:
    """Inputs of the first model, with every size that any model fixes, and the widest past keys and values.

    UserError: two models with different inputs.
    """
    merged = {spec.name: spec for spec in inputs[0]}
    for label, specs in zip(labels[1:], inputs[1:], strict=True):
        named = {spec.name: spec for spec in specs}
        for name in [*merged, *named]:
            if name not in merged or name not in named:
                has, lacks = (labels[0], label) if name in merged else (label, labels[0])
                raise UserError(f"{has} and {lacks} cannot run on the same inputs: only {has} has {name!r}")
        for name, spec in merged.items():
            if is_cache_input(spec) and is_cache_input(named[name]):
                widest = max((s.shape[-1] for s in (spec, named[name])), key=lambda n: n if isinstance(n, int) else 0)
                merged[name], named[name] = (replace(s, shape=(*s.shape[:-1], widest)) for s in (spec, named[name]))
            _check_compatible(labels[0], merged[name], label, named[name])
        # Equal axis names have equal sizes: what the other model fixes in one input is fixed in all inputs.
        pairs = [pair for name, spec in merged.items() for pair in zip(spec.shape, named[name].shape, strict=True)]
        fixed_sizes = {a: b for a, b in pairs if isinstance(a, str) and a and isinstance(b, int)}
        merged = {name: _with_fixed_sizes(spec, named[name], fixed_sizes) for name, spec in merged.items()}
    return tuple(merged.values())


def _check_compatible(first: str, spec: TensorSpec, other: str, against: TensorSpec) -> None:
    subject = f"input {spec.name!r} of {first} and {other}"
    if spec.dtype != against.dtype:
        raise UserError(f"{subject}: the types differ, {spec.dtype} and {against.dtype}")
    if len(spec.shape) != len(against.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(spec.shape, against.shape, strict=True)
    ):
        raise UserError(f"{subject}: the shapes differ, {shape_text(spec.shape)} and {shape_text(against.shape)}")


def _with_fixed_sizes(spec: TensorSpec, against: TensorSpec, fixed_sizes: Mapping[str, int]) -> TensorSpec:
    shape = (
        b if isinstance(b, int) else fixed_sizes.get(a, a) if isinstance(a, str) else a
        for a, b in zip(spec.shape, against.shape, strict=True)
    )
    return replace(spec, shape=tuple(shape))


def _check_axis_options(inputs: Sequence[TensorSpec], batch: int, dim_sizes: Mapping[str, int]) -> None:
    """Refuse sizes that no input can use."""
    described = ", ".join(f"{spec.name} {shape_text(spec.shape)}" for spec in inputs)
    fixed = [spec.shape[0] for spec in inputs if spec.shape]
    if batch != 1 and batch not in fixed and all(isinstance(dim, int) for dim in fixed):
        raise UserError(f"batch {batch}: no input has a dynamic first axis: {described}")
    text = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    terms = {term.strip() for dim in text for term in (dim, *dim.split("+"))}
    terms |= {f"{spec.name}.{axis}" for spec in inputs for axis, dim in enumerate(spec.shape) if dim == ""}
    for name in dim_sizes:
        if name not in terms:
            raise UserError(f"size of axis {name!r}: no input has a dynamic axis of that name: {described}")


def _read_feeds(
    inputs: Sequence[TensorSpec], data: RandomInputs | Feeds | Iterable[Feeds]
) -> list[dict[str, AnyArray]]:
    if isinstance(data, RandomInputs):
        _check_axis_options(inputs, data.batch, data.dim_sizes or {})
        return [data.draw(inputs)]
    several = [data] if isinstance(data, Mapping) else data
    feeds = [check_feeds(inputs, feed) for feed in islice(several, MAX_FEEDS)]
    if not feeds:
        raise UserError("the data is empty: nothing to run the models on")
    return feeds


def _model_labels(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two names are equal."""
    count = Counter(path.name for path in paths)
    return [path.name if count[path.name] == 1 else str(path) for path in paths]


def _output_diff(name: str, first: AnyArray, other: AnyArray) -> OutputDiff:
    if first.shape != other.shape:
        return OutputDiff(name, None, f"shapes {shape_text(first.shape)} and {shape_text(other.shape)}")
    if object in (first.dtype, other.dtype):
        return OutputDiff(name, None, "strings")
    a, b = (array.astype(np.result_type(array.dtype, np.float64)) for array in (first, other))
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # inf - inf is no difference here
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(gap).all():
        return OutputDiff(name, None, f"{np.count_nonzero(~np.isfinite(gap))} entries not finite in only one model")
    return OutputDiff(name, float(gap.max(initial=0.0)))


def _describe_machine(runners: Sequence[Runner]) -> Machine:
    return Machine(
        provider=", ".join(dict.fromkeys(runner.device for runner in runners)),
        threads=runners[0].threads,
        cpu=cpu_name(),
        cores=available_cores(),
        runtime=", ".join(dict.fromkeys(runner.version for runner in runners)),
    )


def _timing_cells(timing: Timing, percents: Sequence[float]) -> tuple[str, ...]:
    at = dict(timing.percentiles)
    numbers = (timing.median, timing.mean, timing.min, *(at[percent] for percent in percents))
    return (timing.model, *(f"{ms:.3f}" for ms in numbers))


def _speedup_cells(speedup: Speedup | None) -> tuple[str, ...]:
    if speedup is None:
        return ("1.00x", "", "", "")
    worst = speedup.largest_difference
    return (
        f"{speedup.ratio:.2f}x",
        f"{speedup.low:.2f}..{speedup.high:.2f}",
        f"{speedup.q1:.2f}..{speedup.q3:.2f}",
        f"{worst.max_abs:.2g} ({worst.name})" if worst else "",
    )
