"""Calibration data as batches: samples are chosen, batches planned from rows of parts, and read when they are due."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.runtime.calibration.held_out import count_held_out, count_left_over, split_in_order, split_samples
from snpc.runtime.calibration.sources import (
    ArraysInMemory,
    CalibrationPart,
    CalibrationSource,
    FilledKind,
    ImageFormat,
    RowsInMemory,
)
from snpc.runtime.calibration.text_inputs import describe_filled
from snpc.runtime.calibration.validation import (
    SampleAxes,
    count_samples,
    find_sample_axes,
    sample_shapes,
    validate_and_convert,
)
from snpc.types import AnyArray, BoolArray, IntArray, Shape, TensorSpec

MAX_EMPTY_PARTS = 1000


@dataclass(frozen=True, eq=False)
class RowSelection:
    """Rows of one part that go into one batch.

    ``offset``: number of the part's first row in the whole source. ``batch_key``: selections with equal keys can share
    a batch.
    """

    part: CalibrationPart
    shapes: Mapping[str, Shape] = field(repr=False)
    rows: IntArray
    offset: int
    batch_key: Hashable = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sample_ids(self) -> IntArray:
        """[rows]: the numbers of these samples in the source, from 0."""
        return self.offset + self.rows


@dataclass(frozen=True)
class DataPart:
    """The part number ``index`` (from 1) of the ``count`` parts into which the data ``origin`` was split."""

    origin: str
    index: int
    count: int

    def describe(self) -> str:
        return f"part {self.index} of {self.count} of {self.origin}"


@dataclass(frozen=True)
class Calibration:
    """Calibration data that fits a model; ``batches()`` gives the same batches each time it is called.

    ``samples``: how many are fed. ``batch``: samples per batch at most, or the model's own batch size. ``requested``:
    how many samples were asked for. ``available``: how many the source holds (None: not counted). ``dropped``:
    samples that were chosen but do not fill a batch of the model's size. ``held_out``: other samples of the source,
    which ``batches`` does not give, so that nothing is fitted to them; None where samples are too few. ``random``: they
    are noise. ``seed``: what drew them. ``images``: how pictures were prepared, where they are pictures. ``part``:
    which part of larger data this is, if it is one. ``filled``: inputs that the data lacks and that follow from its
    token ids, with what they are filled with (``text_inputs``). ``token_format``: how text became tokens, where it is
    text.

    How the data is read: ``batch_plan`` has the row selections of each batch; ``stored_inputs`` are the inputs as the
    source holds them; ``sample_axes`` says which of them have a sample axis; with ``unbatched`` the model takes single
    samples, without a sample axis.
    """

    source: str
    inputs: tuple[TensorSpec, ...]
    samples: int
    batch: int
    requested: int
    available: int | None
    dropped: int
    batch_plan: tuple[tuple[RowSelection, ...], ...] = field(repr=False, compare=False)
    stored_inputs: tuple[TensorSpec, ...] = field(repr=False)
    sample_axes: SampleAxes = field(repr=False)
    unbatched: bool = field(repr=False)
    held_out: Calibration | None = field(default=None, repr=False, compare=False)
    random: bool = False
    seed: int = 0
    images: ImageFormat | None = None
    part: DataPart | None = None
    filled: Mapping[str, FilledKind] = field(default_factory=dict, compare=False)
    token_format: str = ""
    batches_of_whole: float | None = field(default=None, repr=False, compare=False)

    def batches(self) -> Iterator[dict[str, AnyArray]]:
        """Feeds: input name -> [at most ``batch``, ...] in the model's type. One part is in memory at a time.

        Raises UserError for values that cannot be calibrated on: NaN, infinity, a mask that hides every token.
        """
        open_part: tuple[CalibrationPart, Mapping[str, AnyArray]] | None = None
        for selections in self.batch_plan:
            feeds = []
            for selection in selections:
                if open_part is None or open_part[0] is not selection.part:
                    open_part = (selection.part, _read_part(selection, self.stored_inputs))
                feeds.append(self._take(selection, open_part[1]))
            yield self._joined(feeds)

    def batch_sizes(self) -> list[int]:
        """Samples of each batch."""
        return [sum(map(len, selections)) for selections in self.batch_plan]

    def first_rows(self, rows: int) -> Iterator[dict[str, AnyArray]]:
        """The first ``rows`` samples of each batch; all samples where the model takes full batches only."""
        for feeds in self.batches():
            yield (
                feeds
                if self.sample_axes.batch_size or self.unbatched
                else {k: v[:rows] if self.has_sample_axis(k) else v for k, v in feeds.items()}
            )

    def slice(self, start: int, stop: int) -> Calibration:
        """The batches from ``start`` to ``stop`` alone, as a value that can be sent to another process: of data in
        memory it holds their rows alone, of files the paths."""
        plan = tuple(
            tuple(_without_other_rows(rows, self.sample_axes) for rows in batch)
            for batch in self.batch_plan[start:stop]
        )
        return replace(
            self, samples=_planned_samples(plan), batch_plan=plan, held_out=None, batches_of_whole=self.whole_batches
        )

    def restricted_to(self, inputs: Sequence[TensorSpec]) -> Calibration:
        """The same samples with these inputs alone, such as those of one part of a model."""
        names = {spec.name for spec in inputs}
        return replace(
            self,
            inputs=tuple(inputs),
            stored_inputs=tuple(spec for spec in self.stored_inputs if spec.name in names),
            sample_axes=replace(self.sample_axes, inputs=self.sample_axes.inputs & names),
            held_out=self.held_out.restricted_to(inputs) if self.held_out is not None else None,
            filled={name: kind for name, kind in self.filled.items() if name in names},
        )

    def without_data(self) -> Calibration:
        """The same without arrays in memory, so that batches can be named but not given; of files all stays."""
        held = {id(rows.part): rows.part for batch in self.batch_plan for rows in batch}.values()
        if not any(isinstance(part.read, RowsInMemory) for part in held):
            return self
        bare = {id(part): replace(part, read=RowsInMemory({}, np.zeros(0, np.int64), {})) for part in held}
        plan = tuple(tuple(replace(rows, part=bare[id(rows.part)]) for rows in batch) for batch in self.batch_plan)
        return replace(self, batch_plan=plan)

    def shard(self, index: int, count: int) -> Calibration:
        """Part ``index`` (from 1) of ``count`` parts of the samples, for a job that measures one part. The parts hold
        whole pairs of batches, in order, so that even batches of the whole are even in the part.

        Raises UserError where there are fewer pairs than parts.
        """
        pairs = -(-len(self.batch_plan) // 2)
        if not 1 <= index <= count <= pairs:
            raise UserError(
                f"part {index} of {count}: parts hold pairs of batches, and there are {pairs} of these "
                f"({self.describe()}): number parts from 1, at most {pairs}, or use smaller batches (--calib-batch)"
            )
        start, stop = (2 * (pairs * number // count) for number in (index - 1, index))
        return replace(self.slice(start, stop), part=DataPart(self.origin, index, count))

    def batch_text(self, number: int) -> str:
        """The samples of one batch by their numbers in the source, for messages: ``in samples 8 to 15``."""
        ids = np.concatenate([selection.sample_ids for selection in self.batch_plan[number]])
        if len(ids) == 1:
            return f"in sample {ids[0]}"
        if (np.diff(ids) == 1).all():
            return f"in samples {ids[0]} to {ids[-1]}"
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        return f"in samples {', '.join(map(str, ids[:8]))}{more}"

    def has_sample_axis(self, name: str) -> bool:
        """Whether the first axis of this input is the sample axis."""
        return name in self.sample_axes.inputs

    def max_elements(self) -> dict[str, int]:
        """Input name -> number of elements in the largest batch."""
        elements: dict[str, int] = {}
        for selections in self.batch_plan:
            for spec in self.stored_inputs:
                rows = sum(map(len, selections)) if spec.name in self.sample_axes.inputs else 1
                each = selections[0].shapes[spec.name][1 if spec.name in self.sample_axes.inputs else 0 :]
                elements[spec.name] = max(elements.get(spec.name, 0), rows * math.prod(each))
        return elements

    def fills(self, names: Collection[str]) -> bool:
        """Whether one of these inputs is not empty in some sample, one that is held out too."""
        parts = [self] if self.held_out is None else [self, self.held_out]
        return any(count for part in parts for name, count in part.max_elements().items() if name in names)

    @property
    def whole_batches(self) -> float:
        """How many batches as large as the largest the data make; of a slice, those of the whole."""
        if self.batches_of_whole is not None:
            return self.batches_of_whole
        largest = max(self.max_elements().items(), key=lambda item: item[1], default=None)
        if largest is None or not largest[1]:
            return float(len(self.batch_plan))
        name, most = largest
        axis = 1 if name in self.sample_axes.inputs else 0
        each = (math.prod(s[0].shapes[name][axis:]) * (sum(map(len, s)) if axis else 1) for s in self.batch_plan)
        return sum(each) / most

    @property
    def origin(self) -> str:
        """The samples in words that tell them from other samples of the same source."""
        return f"{self.describe()}, seed {self.seed}"

    def describe(self) -> str:
        """``128 of 256 samples from calib.npz, 8 per batch``"""
        size = min(self.batch, self.samples)
        if self.available is None:
            text = f"the first {self.samples} samples from {self.source}, {size} per batch"
        elif self.samples == self.available:
            short = f" ({self.requested} asked)" if self.requested > self.available else ""
            text = f"all {self.samples} samples from {self.source}{short}, {size} per batch"
        else:
            text = f"{self.samples} of {self.available} samples from {self.source}, {size} per batch"
        if self.held_out is not None:
            text += f", {self.held_out.samples} others held out"
        if self.images is not None:
            text += f", pictures {self.images.describe()}"
        if self.token_format:
            text += f", {self.token_format}"
        if self.filled:
            text += f", filled in: {describe_filled(self.filled)}"
        return text + (f", {self.dropped} dropped: the model's batch is {self.batch}" if self.dropped else "")

    @cached_property
    def digest(self) -> str:
        """sha256 of the samples, whatever their batches are. Reads all of them, once."""
        shas = {spec.name: hashlib.sha256() for spec in self.stored_inputs}
        for feeds in Calibration.batches(self):  # of a subclass: without what it adds
            for name, sha in shas.items():
                sha.update(np.ascontiguousarray(feeds[name]).tobytes())
        return hashlib.sha256("".join(name + sha.hexdigest() for name, sha in shas.items()).encode()).hexdigest()

    @property
    def identity(self) -> tuple[str, list[int], str, DataPart | None]:
        """What tells these samples, their batches and where they come from, from others. Reads all samples, once."""
        return self.digest, self.batch_sizes(), self.origin, self.part

    def record(self) -> dict[str, Any]:
        """What a plan or a report says of its data: enough to use the same again, and to see that it is the same."""
        return {
            "source": self.source,
            "samples": self.samples,
            "batch": self.batch,
            "seed": self.seed,
            "held_out": self.held_out.samples if self.held_out is not None else 0,
            "images": asdict(self.images) if self.images is not None else None,
            "digest": self.digest,
            "text": self.describe(),
        }

    def _take(self, selection: RowSelection, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        feed = {}
        for spec in self.stored_inputs:
            sampled = spec.name in self.sample_axes.inputs
            rows = arrays[spec.name][selection.rows] if sampled else arrays[spec.name].copy()
            numbers = selection.rows if sampled else None
            feed[spec.name] = validate_and_convert(rows, spec, selection.part.label, numbers)
        return feed

    def _joined(self, feeds: Sequence[dict[str, AnyArray]]) -> dict[str, AnyArray]:
        feed = dict(feeds[0])
        for name in self.sample_axes.inputs if len(feeds) > 1 else ():
            feed[name] = np.concatenate([feed_part[name] for feed_part in feeds])
        return {name: array[0] for name, array in feed.items()} if self.unbatched else feed


@dataclass(frozen=True)
class SampleRequest:
    """``samples`` to fit to, in batches of ``batch``, at most ``held_out`` others, and the ``seed`` that draws them."""

    samples: int
    batch: int
    seed: int
    held_out: int = 0


def calibration_from_source(
    source: CalibrationSource, inputs: tuple[TensorSpec, ...], request: SampleRequest
) -> Calibration:
    """Read the headers of all parts, choose the samples and plan the batches; reads no values of files."""
    axes = find_sample_axes(source.inputs)
    parts = _survey_parts(source, axes, request.samples + count_left_over(request.samples, request.held_out))
    total = sum(map(len, parts))
    if not total:
        raise UserError(f"{source.label}: it holds no samples: at least one is needed")
    size = axes.batch_size or request.batch
    for count in (count_held_out(request.samples, total, request.held_out, axes.batch_size), 0):
        chosen, held_out = (_select(parts, flags) for flags in _split(source, request, total, count))
        plan, held_out_plan = (_plan_batches(rows, source.inputs, axes, size) for rows in (chosen, held_out))
        if not count or (plan and held_out_plan):  # else none is held out: too few of equal sizes for a fixed batch
            break
    used = _planned_samples(plan)
    if not used:
        raise UserError(_too_few_message(source.label, size, min(request.samples, total), total))
    calibration = Calibration(
        source=source.label,
        inputs=inputs,
        samples=used,
        batch=size,
        requested=request.samples,
        available=None if source.length_unknown and total >= request.samples else total,
        dropped=sum(map(len, chosen)) - used,
        batch_plan=plan,
        stored_inputs=source.inputs,
        sample_axes=axes,
        unbatched=source.unbatched,
        seed=request.seed,
        images=source.images,
        filled={name: kind for rows in parts for name, kind in rows.part.filled.items()},
        token_format=source.token_format,
    )
    if not count:
        return calibration
    rest = replace(calibration, samples=_planned_samples(held_out_plan), batch_plan=held_out_plan, dropped=0)
    return replace(calibration, held_out=rest)


def calibration_from_batches(whole: Calibration, source: CalibrationSource) -> Calibration:
    """The samples of ``whole`` as ``source`` has them for another model: a part for each batch, in order."""
    axes = find_sample_axes(source.inputs)
    parts = _survey_parts(source, axes, whole.samples)
    return replace(
        whole,
        inputs=source.inputs,
        batch_plan=tuple((part,) for part in parts),
        stored_inputs=source.inputs,
        sample_axes=axes,
        held_out=None,
        filled={name: kind for rows in parts for name, kind in rows.part.filled.items()},
    )


def _split(source: CalibrationSource, request: SampleRequest, total: int, held_out: int) -> tuple[BoolArray, BoolArray]:
    """([total]: is the sample fitted to, [total]: is it held out)."""
    if source.length_unknown and (total >= request.samples + held_out or not held_out):
        return split_in_order(request.samples, total, held_out)
    return split_samples(request.samples, total, held_out, request.seed)


def _plan_batches(
    rows: Sequence[RowSelection], inputs: Sequence[TensorSpec], axes: SampleAxes, size: int
) -> tuple[tuple[RowSelection, ...], ...]:
    """Batches of ``size``; where the model fixes its batch size, the full ones."""
    plan = pack_batches([replace(part, batch_key=_batch_key(part, inputs, axes)) for part in rows], size)
    return tuple(tuple(batch) for batch in plan if not axes.batch_size or sum(map(len, batch)) == size)


def _without_other_rows(selection: RowSelection, axes: SampleAxes) -> RowSelection:
    """The selection with a part that holds no other rows, where the part is in memory."""
    reader = selection.part.read
    if not isinstance(reader, ArraysInMemory):
        return selection
    sampled = {
        name
        for name, header in selection.part.headers.items()
        if name in axes.inputs and name in selection.shapes and header.shape == selection.shapes[name]
    }
    return replace(selection, part=replace(selection.part, read=reader.only(selection.rows, sampled)))


def _planned_samples(plan: Sequence[Sequence[RowSelection]]) -> int:
    return sum(len(rows) for selections in plan for rows in selections)


def _survey_parts(source: CalibrationSource, axes: SampleAxes, samples: int) -> list[RowSelection]:
    """Every part with all of its rows; of a source of unknown length, the first parts that hold ``samples``."""
    selections: list[RowSelection] = []
    total = empty = 0
    for part in source.parts:
        shapes = sample_shapes(part, source.inputs, source.allow_single_sample)
        rows = np.arange(count_samples(part, shapes, source.inputs, axes))
        selections.append(RowSelection(part, shapes, rows, total))
        total += len(selections[-1])
        empty = 0 if len(selections[-1]) else empty + 1
        if empty > MAX_EMPTY_PARTS:  # code may yield such batches for ever
            raise UserError(
                f"{part.label}: the {empty}th batch in a row without a sample; yield batches that hold some"
            )
        if source.length_unknown and total >= samples:
            break
    return selections


def _select(parts: Sequence[RowSelection], flags: BoolArray) -> list[RowSelection]:
    """The rows of all parts whose flag is set, left in the order they are stored. ``flags``: [rows of all parts]."""
    ends = np.cumsum([len(part) for part in parts])
    kept_by_part = np.split(flags, ends[:-1])
    chosen = [replace(part, rows=part.rows[kept]) for part, kept in zip(parts, kept_by_part, strict=True)]
    return [selection for selection in chosen if len(selection)]


def _batch_key(selection: RowSelection, inputs: Sequence[TensorSpec], axes: SampleAxes) -> Hashable:
    """Equal for selections that can share a batch: equal sizes behind the sample axis, equal inputs without one."""
    sizes = tuple(selection.shapes[name][1:] for name in sorted(axes.inputs))
    fixed = [spec for spec in inputs if spec.name not in axes.inputs]
    if not fixed:
        return sizes
    arrays = _read_part(selection, fixed)
    return sizes, tuple(arrays[spec.name].tobytes() for spec in fixed)


def pack_batches(selections: Sequence[RowSelection], size: int) -> list[list[RowSelection]]:
    """Batches of ``size`` in order; a new batch begins where the batch key changes."""
    batches: list[list[RowSelection]] = []
    room = 0
    last: Hashable = None
    for selection in selections:
        rows = selection.rows
        while len(rows):
            if not room or selection.batch_key != last:
                batches.append([])
                room, last = size, selection.batch_key
            batches[-1].append(replace(selection, rows=rows[:room]))
            rows = rows[room:]
            room -= len(batches[-1][-1])
    return batches


def _read_part(selection: RowSelection, inputs: Sequence[TensorSpec]) -> dict[str, AnyArray]:
    """The part's arrays with their leading axes; files may have changed since the survey."""
    arrays = selection.part.read([spec.name for spec in inputs])
    for spec in inputs:
        shape = arrays[spec.name].shape
        if selection.shapes[spec.name] not in (shape, (1, *shape)):
            raise UserError(f"{selection.part.label}: input '{spec.name}' changed while it was in use: run again")
    return {spec.name: arrays[spec.name].reshape(selection.shapes[spec.name]) for spec in inputs}


def _too_few_message(label: str, size: int, drawn: int, total: int) -> str:
    subject = f"{label}: the model's batch is {size}"
    if total < size:
        return f"{subject}, but there are only {total} samples: give at least {size}, or export it with a dynamic batch"
    if drawn < size:
        return f"{subject}, but only {drawn} of {total} samples are asked for: --calib-samples {size} or more"
    return f"{subject}, but no {size} neighboring samples have the same sizes: store batches of {size} samples"
