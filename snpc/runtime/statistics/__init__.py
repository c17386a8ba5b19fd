"""Statistics of activations, collected inside onnxruntime over calibration data.

Files
  distributed_measure  Statistics measured by the workers of an executor, each on its share of the batches.
  gate_gradients    Gradients of unit gates, for criteria that ask for them.
  instrument        Statistics as nodes of the graph: the runtime sums them along with the model, so that no activation
                    is kept.
  keys              The name of a statistic: what is summed, over which activation.
  measure           Requests for statistics of activations, and a pass over the calibration data that measures them.
  moments           Second moments of a group's activations, as its closed form takes them; computed from measured
                    statistics.
  padding           Padded tokens do not count in statistics: finds the rows of a probe that belong to tokens which
                    nothing attends to.
  probe_layout      How a probed tensor is read as rows of units (usually one row per token).
  rows              From how many rows second moments are summed: where tokens are many, some of every sample's stand
                    for all of them.
  score_loss        The error of attention scores when units of query and key are removed: a quadratic form, summed in
                    the graph.
  statistics        Statistics of a model on calibration data: float64 sums, which add up over parts of the data; and
                    their file.
  streamed_measure  Statistics of a model whose weights do not fit into memory, measured one segment after the other.
  token_relevance   Relevance of each token for the outputs, by layer-wise relevance propagation (LRP) on calibration
                    data.
  unit_weights      The inputs of a criterion: the weights of a group as one row per unit, and its statistics.
"""

from __future__ import annotations

from snpc.runtime.statistics.distributed_measure import keep_token_masks
from snpc.runtime.statistics.gate_gradients import (
    GATE_PREFIX,
    GateObserver,
    needs_gate_gradients,
    needs_gradient_provider,
    register_gradient_provider,
)
from snpc.runtime.statistics.instrument import Instrument
from snpc.runtime.statistics.keys import CLOSED_FORM_STATISTICS, StatisticKey
from snpc.runtime.statistics.measure import StatisticRequest, criterion_keys, statistic_requests
from snpc.runtime.statistics.moments import (
    ConsumerMoments,
    GroupMoments,
    LazyMoments,
    MomentSet,
    consumer_moments,
    group_moments,
    moment_about,
    required_statistics,
)
from snpc.runtime.statistics.padding import (
    PaddingMasks,
    TokenMask,
    TokenMasks,
    find_padding,
    probe_row_counters,
    token_mask_runner,
)
from snpc.runtime.statistics.probe_layout import infer_probe_layout
from snpc.runtime.statistics.rows import SampledRows
from snpc.runtime.statistics.statistics import (
    Statistics,
    check_statistics_match,
    is_streamed,
    load_statistics,
    measure_dense_values,
    measure_statistics,
    save_statistics,
)
from snpc.runtime.statistics.token_relevance import measure_token_relevance
from snpc.runtime.statistics.unit_weights import (
    check_finite_weights,
    criterion_inputs,
    group_weight_rows,
    unit_weight_energies,
)

__all__ = [
    "CLOSED_FORM_STATISTICS",
    "GATE_PREFIX",
    "ConsumerMoments",
    "GateObserver",
    "GroupMoments",
    "Instrument",
    "LazyMoments",
    "MomentSet",
    "PaddingMasks",
    "SampledRows",
    "StatisticKey",
    "StatisticRequest",
    "Statistics",
    "TokenMask",
    "TokenMasks",
    "check_finite_weights",
    "check_statistics_match",
    "consumer_moments",
    "criterion_inputs",
    "criterion_keys",
    "find_padding",
    "group_moments",
    "group_weight_rows",
    "infer_probe_layout",
    "is_streamed",
    "keep_token_masks",
    "load_statistics",
    "measure_dense_values",
    "measure_statistics",
    "measure_token_relevance",
    "moment_about",
    "needs_gate_gradients",
    "needs_gradient_provider",
    "probe_row_counters",
    "register_gradient_provider",
    "required_statistics",
    "save_statistics",
    "statistic_requests",
    "token_mask_runner",
    "unit_weight_energies",
]
