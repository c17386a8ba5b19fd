"""snpc: make exported attention models small and fast.

    snpc.prune("vit.onnx", "vit-half.onnx", target="macs=0.5", calibration="calib.npz")

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
from snpc.folders import PrunedFolder, prune_folder
from snpc.passes import Analysis, analyze
from snpc.pipeline import (
    PrunedModel,
    PruningPlan,
    apply,
    complete_plan,
    json_report,
    load_plan,
    plan,
    prune,
    save_plan,
    score,
    verify,
)
from snpc.planning import (
    Budget,
    ResourceTarget,
    SlicePlan,
    UnitScores,
    make_slice_plan,
    parse_target,
    plan_from_json,
    plan_to_json,
)
from snpc.report import write_report
from snpc.runtime.calibration import Calibration, ImageOptions, TextOptions, load_calibration
from snpc.runtime.closed_form import ClosedForms, solve_closed_forms
from snpc.runtime.evaluation import BenchResult, TimingProtocol, Workload, bench
from snpc.runtime.execution import Execution, RandomInputs, random_calibration
from snpc.runtime.io import WorkFolder, load, save, write_example
from snpc.runtime.statistics import Statistics, load_statistics, measure_statistics, save_statistics
from snpc.targets import (
    TARGETS,
    BuildResult,
    PreferredWidths,
    build,
    dequantize,
    restrict,
    timed_artifact,
    widths_for_target,
)
from snpc.targets import BuildOptions as BuildOptions
from snpc.tokens import reduce_tokens
from snpc.types import Cost, Dequantization, Difference, Group, Model, Pin, Probe, Quality, Site, Verdict
from snpc.version import __version__

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
    "Dequantization",
    "Difference",
    "Execution",
    "Group",
    "ImageOptions",
    "Model",
    "Pin",
    "PreferredWidths",
    "Probe",
    "PrunedFolder",
    "PrunedModel",
    "PruningPlan",
    "Quality",
    "RandomInputs",
    "ResourceTarget",
    "Site",
    "SlicePlan",
    "SnpcError",
    "Statistics",
    "TextOptions",
    "TimingProtocol",
    "UnitScores",
    "UserError",
    "Verdict",
    "WorkFolder",
    "Workload",
    "__version__",
    "analyze",
    "apply",
    "bench",
    "build",
    "complete_plan",
    "dequantize",
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
    "prune_folder",
    "random_calibration",
    "reduce_tokens",
    "restrict",
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
