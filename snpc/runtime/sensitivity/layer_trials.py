"""Trials of removed sublayers: the outputs of the whole model with any of them switched off, on a few samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from snpc.ops import names as op
from snpc.passes import Analysis
from snpc.passes.grouping import TracedGraph
from snpc.passes.slicing import weigh_statistics, weights_name
from snpc.passes.sublayers import Substitute, Substitutes, switch_name, with_switches
from snpc.runtime.calibration import Calibration
from snpc.runtime.evaluation import OutputMetrics
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution, RunFunction, temporary_session
from snpc.runtime.sensitivity.loss_curves import leading_axes, output_token_masks
from snpc.runtime.sensitivity.plan_trials import small_batches
from snpc.runtime.statistics import Instrument, TokenMask, find_padding, token_mask_runner
from snpc.types import AnyArray, Feeds, FloatArray, Shape, Sublayer

LAYER_SAMPLES = 32  # of a trial; a removed layer changes outputs so much that few show it
ENOUGH_ROWS = 2048  # of an output, as tokens of texts: then fewer samples will do, but for LEAST_SAMPLES
LEAST_SAMPLES = 8
SCREENED_ROWS = 512  # enough of them to tell which layers are worth a trial on all
RUN_TOGETHER = 2  # samples that are run together


@dataclass
class LayerTrials:
    """Changes of the outputs by which sublayers are gone. ``names``: of those that may go."""

    run: RunFunction
    names: tuple[str, ...]
    batches: Sequence[LayerTrialBatch]
    known: dict[tuple[frozenset[str], int], float] = field(default_factory=dict)

    def change(self, gone: Iterable[str]) -> float:
        """Mean over the samples of ``OutputMetrics.change``, like a squared error."""
        return self.change_on(frozenset(gone), len(self.batches))

    def screen(self, gone: Iterable[str]) -> float:
        """``change`` on the first samples only."""
        return self.change_on(frozenset(gone), screened_batches(self.batches))

    def change_on(self, gone: frozenset[str], count: int) -> float:
        """``change`` on so many batches."""
        if (gone, count) not in self.known:
            switches = {switch_name(name): np.array(name not in gone) for name in self.names}
            batches = self.batches[:count]
            changes = [
                batch.metrics.change(batch.outputs, self.run({**batch.feeds, **switches}), batch.token_masks)
                for batch in batches
            ]
            self.known[gone, count] = float(np.average(changes, weights=[batch.samples for batch in batches]))
        return self.known[gone, count]


@dataclass(frozen=True)
class LayerTrialBatch:
    """One batch: the dense model's outputs, which of their tokens count, and how they are judged."""

    feeds: Feeds
    outputs: Mapping[str, AnyArray]
    token_masks: Mapping[str, TokenMask]
    metrics: OutputMetrics

    @property
    def samples(self) -> int:
        return max((len(array) for array in self.outputs.values() if array.ndim), default=1)

    @property
    def rows(self) -> int:
        """Of the output with fewest: its tokens, or its samples."""
        shapes = (leading_axes(array.shape) if array.ndim > 2 else array.shape[:1] for array in self.outputs.values())
        return min((int(np.prod(shape)) for shape in shapes), default=1)


@contextmanager
def open_layer_trials(
    analysis: Analysis,
    sublayers: Sequence[Sublayer],
    substitutes: Substitutes,
    batches: Sequence[LayerTrialBatch],
    execution: Execution = DEFAULT_EXECUTION,
    weights: Mapping[str, AnyArray] | None = None,
) -> Iterator[LayerTrials]:
    """Trials of these sublayers; the ``substitutes`` stand for those that have one. ``weights``: contents of constants
    by name, as ``trial_weights`` gives them."""
    model = with_switches(analysis.traced_graph, sublayers, substitutes)
    set_weights(model, analysis.traced_graph, weights or {})
    with temporary_session(model, execution=execution) as run:
        yield LayerTrials(run, tuple(sublayer.name for sublayer in sublayers), batches)


def set_weights(model: ir.Model, source: TracedGraph, weights: Mapping[str, AnyArray]) -> None:
    """Put new contents into constants of ``model``, a copy of ``source``, and weigh its statistics as they say."""
    weigh_statistics(model.graph, source.trace, (s for s in source.trace.statistics if weights_name(s) in weights))
    for name in weights.keys() & set(model.graph.initializers):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(weights[name], dtype=value.dtype, name=name)


def screened_batches(batches: Sequence[LayerTrialBatch]) -> int:
    """How many of the batches have ``SCREENED_ROWS``; all of them where they have fewer."""
    rows = np.cumsum([batch.rows for batch in batches])
    return min(int(np.searchsorted(rows, SCREENED_ROWS)) + 1, len(batches))


def layer_trial_batches(
    analysis: Analysis, calibration: Calibration, execution: Execution = DEFAULT_EXECUTION
) -> list[LayerTrialBatch]:
    """``LAYER_SAMPLES`` samples with the dense model's outputs, or fewer of many tokens."""
    source, metrics = analysis.traced_graph, OutputMetrics.of(analysis)
    padding = find_padding(source, [(spec.name, leading_axes) for spec in analysis.model.outputs])
    batches: list[LayerTrialBatch] = []
    with (
        token_mask_runner(source, padding, execution) as masks,
        temporary_session(source.model.clone(), execution=execution) as run,
    ):
        for feeds in small_batches(calibration, LAYER_SAMPLES, RUN_TOGETHER):
            outputs = run(feeds)
            metrics = metrics.for_values(outputs)
            batches.append(LayerTrialBatch(feeds, outputs, output_token_masks(masks(feeds), padding), metrics))
            if sum(b.samples for b in batches) >= LEAST_SAMPLES and sum(b.rows for b in batches) >= ENOUGH_ROWS:
                break
    return batches


# -- what can stand for a sublayer -----------------------------------------------------------------------------------


def measure_means(
    analysis: Analysis,
    sublayers: Sequence[Sublayer],
    calibration: Calibration,
    execution: Execution = DEFAULT_EXECUTION,
) -> dict[str, Substitute]:
    """Name -> the mean over the tokens of the data of what a sublayer adds to a stream [batch, tokens, D].
    Padded tokens do not count; sublayers of other streams have none."""
    source = analysis.traced_graph
    shapes = source.facts.shapes_by_name
    measured = [s for s in sublayers if len(shapes.get(s.branch, ())) == 3]
    if not measured:
        return {}
    padding = find_padding(source, [(s.branch, batch_and_tokens) for s in measured])
    instrument = Instrument(source.model, padding.row_masks)
    for number, sublayer in enumerate(measured):
        value, mask = instrument.cast_float32(instrument.values[sublayer.branch]), instrument.row_mask(sublayer.branch)
        rows = {"sum": instrument.zero_masked(value, mask), "count": instrument.ones_column(value, mask)}
        for what, counted in rows.items():
            instrument.add_output(instrument.reduce(op.REDUCE_SUM, counted, (0, 1)), f"snpc_{what}_{number}")
    totals: dict[str, FloatArray] = {}
    batches = execution.track("layer means", calibration.batches(), len(calibration.batch_plan))
    with (
        token_mask_runner(source, padding, execution) as masks,
        temporary_session(instrument.model, execution=execution) as run,
    ):
        for feeds in batches:
            for name, array in run({**feeds, **masks(feeds)}).items():
                totals[name] = totals.get(name, 0.0) + array.astype(np.float64)
    return {
        sublayer.name: Substitute(totals[f"snpc_sum_{number}"] / max(float(totals[f"snpc_count_{number}"].sum()), 1.0))
        for number, sublayer in enumerate(measured)
    }


def batch_and_tokens(shape: Shape) -> tuple[int, int]:
    """(samples, rows of each) of a stream [batch, tokens, D]."""
    return shape[0], shape[1]
