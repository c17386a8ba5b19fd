"""Random data to calibrate on, where there is none."""

from __future__ import annotations

from dataclasses import replace

from snpc.errors import UserError
from snpc.graph import DimSizes
from snpc.passes import Analysis
from snpc.runtime.calibration import Calibration, find_sample_axes, load_calibration
from snpc.runtime.execution.memory import model_weights, too_large_reason
from snpc.runtime.execution.random_inputs import feed_sizes, random_batch
from snpc.runtime.execution.session import SessionLoadError
from snpc.runtime.execution.size_trial import find_running_sizes
from snpc.runtime.execution.temporary_session import file_session

SEED_STRIDE = 1 << 20  # each of so many batches has its own seed
RANDOM_SOURCE = "random inputs (no data)"
RANDOM_HELD_OUT = 16  # quality on noise says little, so few samples do


def random_calibration(analysis: Analysis, *, samples: int = 128, batch: int = 8, seed: int = 0) -> Calibration:
    """Calibration data for a model of which there is none: floats standard normal, ids uniform over the embedding that
    they index, masks of ones, dynamic axes as analyzed.

    No real input looks like this, and a model calibrated on it keeps what matters for noise. A model that does not run
    at the sizes of the analysis gets those at which it does, and the batch that it takes. UserError: it runs at none.
    """
    inputs = analysis.model.inputs
    size = find_sample_axes(inputs).batch_size or max(batch, 1)
    dim_sizes = sizes_that_run(analysis, size)
    taken = feed_sizes(analysis, size, dim_sizes).get(leading_name(analysis), size)
    if taken != size:
        size = batch = taken
    batches = -(-(samples + RANDOM_HELD_OUT) // size)
    feeds = [random_batch(analysis, size, seed * SEED_STRIDE + number, dim_sizes) for number in range(batches)]
    calibration = load_calibration(feeds, inputs, samples=samples, batch=batch, seed=seed, held_out=RANDOM_HELD_OUT)
    held_out = calibration.held_out
    if held_out is not None:
        held_out = replace(held_out, source=RANDOM_SOURCE, random=True)
    return replace(calibration, source=RANDOM_SOURCE, random=True, held_out=held_out)


def sizes_that_run(analysis: Analysis, batch: int) -> DimSizes:
    """Sizes of dynamic dimensions: those of the analysis, where the original runs at them."""
    chosen = analysis.traced_graph.dim_sizes
    if not chosen or too_large_reason(model_weights(analysis.model.graph)):
        return chosen
    try:
        with file_session(analysis.model.path) as run:
            try:
                run(random_batch(analysis, batch))
            except UserError:
                return find_running_sizes(analysis, run)
    except SessionLoadError:  # whoever runs the model says so
        pass
    return chosen


def leading_name(analysis: Analysis) -> str:
    """Name of the batch axis; empty where there is none."""
    return next((str(spec.shape[0]) for spec in analysis.model.inputs if len(spec.shape) > 1), "")
