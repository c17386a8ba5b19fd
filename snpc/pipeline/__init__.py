"""The verbs of snpc, each a function of the value that the one before returned.

Files
  apply            Apply a plan: write the pruned model and verify it; search where the plan has to meet a drift or a
                   latency.
  candidate        Candidates: pruned models written under a temporary name and verified, before they are renamed into
                   place.
  planner          Plans: what the closed forms and the criterion say of each unit, the width of each group, and the
                   units that stay.
  prune            The one call: load, analyze, reduce tokens, plan, apply.
  refit            Refitting: the weights of the full-size model, changed so that the cut of a plan loses least.
  report_json      Results as JSON: analysis, plan, pruned model, verdict.
  score            Scores: a criterion's value for every unit of every group, from the weights and from calibration
                   data.
  search           Search for a plan that meets a drift or a latency: candidates along the allocation path are written
                   and measured.
  stage_costs      What the stages of a run cost, in plain passes of the model over its calibration data: a progress
                   that is told it knows the time left over stages that have not begun.
  sweep            Sweeps: one model pruned to several targets, the quality and speed of each, and the Pareto front.
  token_decisions  Token decisions as arrays: computed for given inputs, replayed as graph inputs, and checked against
                   the oracle.
  token_request    Token requests (--tokens): reduce tokens by a specification, or by a schedule that is chosen.
  token_schedule   Token schedules (--tokens auto): which method removes how many tokens where, for a target in MACs.
  verify           Verification of written files: the sliced graph equals the masked one; how close its outputs are.
"""

from __future__ import annotations

from snpc.pipeline.apply import apply
from snpc.pipeline.candidate import PrunedModel, SearchResult, Stopwatch
from snpc.pipeline.planner import (
    PlanRequest,
    PruningPlan,
    complete_plan,
    load_plan,
    make_plan,
    measure_request,
    plan,
    save_plan,
)
from snpc.pipeline.prune import PruneOptions, prune
from snpc.pipeline.report_json import (
    analysis_json,
    dequantization_json,
    describe_approximation,
    describe_stream,
    groups_json,
    json_report,
    quality_json,
    verdict_json,
    write_json,
)
from snpc.pipeline.score import score
from snpc.pipeline.search import check_labels
from snpc.pipeline.stage_costs import (
    completion_stages,
    effort_costs,
    plain_pass_seconds,
    planning_stages,
    run_stages,
)
from snpc.pipeline.sweep import SweepBuilder, SweepPoint, SweepRequest, SweepResult, sweep
from snpc.pipeline.token_decisions import file_decisions, self_deciding_model
from snpc.pipeline.token_request import (
    ALL_TOKENS,
    AUTO_TOKENS,
    apply_token_request,
    effective_token_request,
)
from snpc.pipeline.verify import (
    DecoderPair,
    VerificationData,
    check_cached_decoding,
    measure_quality,
    measure_whole,
    verification_data,
    verify,
)

__all__ = [
    "ALL_TOKENS",
    "AUTO_TOKENS",
    "DecoderPair",
    "PlanRequest",
    "PruneOptions",
    "PrunedModel",
    "PruningPlan",
    "SearchResult",
    "Stopwatch",
    "SweepBuilder",
    "SweepPoint",
    "SweepRequest",
    "SweepResult",
    "VerificationData",
    "analysis_json",
    "apply",
    "apply_token_request",
    "check_cached_decoding",
    "check_labels",
    "complete_plan",
    "completion_stages",
    "dequantization_json",
    "describe_approximation",
    "describe_stream",
    "effective_token_request",
    "effort_costs",
    "file_decisions",
    "groups_json",
    "json_report",
    "load_plan",
    "make_plan",
    "measure_quality",
    "measure_request",
    "measure_whole",
    "plain_pass_seconds",
    "plan",
    "planning_stages",
    "prune",
    "quality_json",
    "run_stages",
    "save_plan",
    "score",
    "self_deciding_model",
    "sweep",
    "verdict_json",
    "verification_data",
    "verify",
    "write_json",
]
