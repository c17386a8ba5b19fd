"""snpc: make exported attention models small and fast.

    snpc.prune("vit.onnx", "vit-half.onnx", ratio=0.5, calibration="calib.npz")

In steps, each of which takes what the one before returned:

    model = snpc.load("vit.onnx")
    analysis = snpc.analyze(model)
    calibration = snpc.load_calibration("calib.npz", model.inputs)
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.5), calibration)
    pruned = snpc.apply(plan, "vit-half.onnx")

``import snpc`` loads numpy, onnx and onnx-ir only.
"""

from __future__ import annotations

from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.pipeline.apply import apply
from snpc.pipeline.candidate import PrunedModel
from snpc.pipeline.planner import PruningPlan, complete_plan, load_plan, plan, save_plan
from snpc.pipeline.prune import prune
from snpc.pipeline.report_json import json_report
from snpc.pipeline.score import score
from snpc.pipeline.verify import verify
from snpc.planning.allocate import make_slice_plan
from snpc.planning.config import Budget, ResourceTarget, parse_target
from snpc.planning.plan import SlicePlan, UnitScores
from snpc.planning.plan_file import plan_from_json, plan_to_json
from snpc.report.page import write_report
from snpc.runtime.calibration import Calibration, ImageOptions, load_calibration
from snpc.runtime.closed_form.fit import ClosedForms, solve_closed_forms
from snpc.runtime.evaluation.bench import BenchResult, TimingProtocol, bench
from snpc.runtime.evaluation.latency import Workload
from snpc.runtime.execution.execution import Execution
from snpc.runtime.execution.feeds import RandomInputs
from snpc.runtime.execution.random_inputs import random_calibration
from snpc.runtime.io.examples import write_example
from snpc.runtime.io.load import load
from snpc.runtime.io.save import save
from snpc.runtime.statistics.statistics import Statistics, load_statistics, measure_statistics, save_statistics
from snpc.targets import TARGETS, BuildResult, PreferredWidths, build, timed_artifact, widths_for_target
from snpc.targets import BuildOptions as BuildOptions
from snpc.tokens.reduction import reduce_tokens
from snpc.types import Cost, Difference, Group, Model, Pin, Probe, Site, Verdict

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "Analysis",
    "BenchResult",
    "Budget",
    "BuildOptions",
    "BuildResult",
    "Calibration",
    "CheckFailed",
    "ClosedForms",
    "Cost",
    "Difference",
    "Execution",
    "Group",
    "ImageOptions",
    "Model",
    "Pin",
    "PreferredWidths",
    "Probe",
    "PrunedModel",
    "PruningPlan",
    "RandomInputs",
    "ResourceTarget",
    "Site",
    "SlicePlan",
    "SnpcError",
    "Statistics",
    "TimingProtocol",
    "UnitScores",
    "UserError",
    "Verdict",
    "Workload",
    "__version__",
    "analyze",
    "apply",
    "bench",
    "build",
    "complete_plan",
    "json_report",
    "load",
    "load_calibration",
    "load_plan",
    "load_statistics",
    "make_slice_plan",
    "measure_statistics",
    "parse_target",
    "plan",
    "plan_from_json",
    "plan_to_json",
    "prune",
    "random_calibration",
    "reduce_tokens",
    "save",
    "save_plan",
    "save_statistics",
    "score",
    "solve_closed_forms",
    "timed_artifact",
    "verify",
    "widths_for_target",
    "write_example",
    "write_report",
]
