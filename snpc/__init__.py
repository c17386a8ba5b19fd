"""snpc: make exported attention models small and fast.

    model = snpc.load("vit.onnx")
    analysis = snpc.analyze(model)
    calibration = snpc.load_calibration("calib.npz", model.inputs)
    decision = snpc.plan(analysis, snpc.Budget(ratio=0.5), calibration=calibration)
    result = snpc.apply(decision, Path("vit-half.onnx"), calibration=calibration)

Each verb takes the value that the one before returned. ``import snpc`` loads numpy, onnx and onnx-ir only.
"""

from __future__ import annotations

from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.pipeline.planner import PruningPlan, plan
from snpc.pipeline.prune import PrunedModel, apply_slice_plan
from snpc.pipeline.report_json import json_report
from snpc.pipeline.score import score
from snpc.pipeline.search import apply
from snpc.pipeline.verify import verify
from snpc.planning.allocate import make_slice_plan
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan, UnitScores
from snpc.planning.plan_file import plan_from_json, plan_to_json
from snpc.report.page import write_report
from snpc.runtime.calibration import Calibration, ImageOptions, load_calibration
from snpc.runtime.closed_form.fit import ClosedForms, solve_closed_forms
from snpc.runtime.evaluation.bench import BenchResult, bench
from snpc.runtime.evaluation.latency import Workload
from snpc.runtime.execution.execution import Execution
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
    "Site",
    "SlicePlan",
    "SnpcError",
    "Statistics",
    "UnitScores",
    "UserError",
    "Verdict",
    "Workload",
    "__version__",
    "analyze",
    "apply",
    "apply_slice_plan",
    "bench",
    "build",
    "json_report",
    "load",
    "load_calibration",
    "load_statistics",
    "make_slice_plan",
    "measure_statistics",
    "plan",
    "plan_from_json",
    "plan_to_json",
    "random_calibration",
    "reduce_tokens",
    "save",
    "save_statistics",
    "score",
    "solve_closed_forms",
    "timed_artifact",
    "verify",
    "widths_for_target",
    "write_example",
    "write_report",
]
