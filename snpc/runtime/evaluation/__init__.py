"""Measuring written models: latency, equality of outputs, accuracy.

Files
  accuracy          Evaluation of a model file on data of its own: a score where there are labels, perplexity of a
                    language model.
  bench             Latency of models, measured side by side.
  cached_decoding   Decoding through caches: token by token it must give what all tokens at once give.
  compare           Checks of a written model: its structure, sliced against masked outputs, and drift from the
                    original.
  distances         Distances of one output: Kullback-Leibler divergence, relative change, cosine, or a function of the
                    user.
  equal_selections  Comparison of two models in front of what they select, and behind it on the same selections.
  latency           Latency that narrower groups save: whole models at a few widths, timed side by side with the dense
                    model.
  metric_choice     The user's metrics: by name, by output, or as a function in a Python file.
  metrics           Which metric suits each output of a model: by what the graph does at its end, by values, or as the
                    user says.
  perplexity        Perplexity of a language model: how well its logits predict the next token of held-out text.
  removed_layers    The oracle of removed layers: the whole graph, in which their outputs are replaced in place.
  requantization    What quantizing refitted weights anew costs, apart from what pruning costs.
  task_metrics      Task metrics: scores of outputs on labels, from 0 to 1, higher is better.
  uncertainty       How certain a measured difference is: a standard error over samples, and an interval for shares of
                    them.
"""

from __future__ import annotations

from snpc.runtime.evaluation.accuracy import EvaluationData, evaluate, measure_task, task_change, task_score
from snpc.runtime.evaluation.bench import (
    BenchResult,
    Speedup,
    TimingProtocol,
    bench,
    is_cache_input,
    median_interval,
    narrow_past,
    run_rounds,
)
from snpc.runtime.evaluation.cached_decoding import (
    RunningDecoder,
    cache_bytes_per_token,
    cache_interface,
    cached_decoding_error,
    decoder_interface,
    likelihood_gap,
)
from snpc.runtime.evaluation.compare import (
    TOLERANCE,
    VERIFICATION_BATCHES,
    batch_differences,
    check_structure,
    compare_models,
    max_relative,
    measure_differences,
    raise_if_unequal,
    rounding_tolerance,
    run_batches,
    take_until,
)
from snpc.runtime.evaluation.distances import OutputMetric
from snpc.runtime.evaluation.equal_selections import compare_on_equal_selections, find_selectors, name_selectors
from snpc.runtime.evaluation.latency import (
    TimedArtifact,
    Workload,
    groups_to_time,
    latency_table,
    time_pair,
    write_narrowed,
)
from snpc.runtime.evaluation.metric_choice import MetricRequest, metrics_identity, with_metrics, with_named_metrics
from snpc.runtime.evaluation.metrics import RELATIVE_METRICS, OutputMetrics, max_drift
from snpc.runtime.evaluation.perplexity import LanguageHead, LanguageJudge, find_language_head, sum_surprise
from snpc.runtime.evaluation.removed_layers import check_removed_layers
from snpc.runtime.evaluation.requantization import measure_requantization
from snpc.runtime.evaluation.task_metrics import TaskMetric, is_task_metric, parse_task_metric

__all__ = [
    "RELATIVE_METRICS",
    "TOLERANCE",
    "VERIFICATION_BATCHES",
    "BenchResult",
    "EvaluationData",
    "LanguageHead",
    "LanguageJudge",
    "MetricRequest",
    "OutputMetric",
    "OutputMetrics",
    "RunningDecoder",
    "Speedup",
    "TaskMetric",
    "TimedArtifact",
    "TimingProtocol",
    "Workload",
    "batch_differences",
    "bench",
    "cache_bytes_per_token",
    "cache_interface",
    "cached_decoding_error",
    "check_removed_layers",
    "check_structure",
    "compare_models",
    "compare_on_equal_selections",
    "decoder_interface",
    "evaluate",
    "find_language_head",
    "find_selectors",
    "groups_to_time",
    "is_cache_input",
    "is_task_metric",
    "latency_table",
    "likelihood_gap",
    "max_drift",
    "max_relative",
    "measure_differences",
    "measure_requantization",
    "measure_task",
    "median_interval",
    "metrics_identity",
    "name_selectors",
    "narrow_past",
    "parse_task_metric",
    "raise_if_unequal",
    "rounding_tolerance",
    "run_batches",
    "run_rounds",
    "sum_surprise",
    "take_until",
    "task_change",
    "task_score",
    "time_pair",
    "with_metrics",
    "with_named_metrics",
    "write_narrowed",
]
