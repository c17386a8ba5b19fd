"""Where the public names are defined. Type checkers read this file, and so does ``snpc/__init__.py``."""

from .errors import CheckFailed, SnpcError, UserError
from .folders import PrunedFolder, prune_folder
from .passes import Analysis, analyze
from .pipeline import (
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
from .planning import (
    Budget,
    ResourceTarget,
    SlicePlan,
    UnitScores,
    make_slice_plan,
    parse_target,
    plan_from_json,
    plan_to_json,
)
from .report import FileComparison, compare_files, write_report
from .runtime.calibration import Calibration, ImageOptions, TextOptions, load_calibration
from .runtime.closed_form import ClosedForms, solve_closed_forms
from .runtime.evaluation import BenchResult, EvaluationData, TaskMetric, TimingProtocol, Workload, bench
from .runtime.execution import Execution, RandomInputs, random_calibration
from .runtime.io import WorkFolder, load, save, write_example
from .runtime.statistics import Statistics, load_statistics, measure_statistics, save_statistics
from .targets import (
    TARGETS,
    BuildResult,
    PreferredWidths,
    build,
    dequantize,
    restrict,
    timed_artifact,
    widths_for_target,
)
from .targets import BuildOptions as BuildOptions
from .tokens import reduce_tokens
from .types import Cost, Dequantization, Difference, Group, Model, Pin, Probe, Quality, Site, Verdict

__version__: str

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
    "EvaluationData",
    "Execution",
    "FileComparison",
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
    "TaskMetric",
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
    "compare_files",
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
