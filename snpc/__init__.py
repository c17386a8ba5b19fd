"""snpc: make exported attention models small and fast.

    model = snpc.load("vit.onnx")
    analysis = snpc.analyze(model)
    calibration = snpc.load_calibration("calib.npz", model.inputs)
    decision = snpc.decide(analysis, snpc.Choice(ratio=0.5), calibration=calibration)
    result = snpc.prune(decision, Path("vit-half.onnx"), calibration=calibration)

Each verb takes the value that the one before returned. ``import snpc`` loads numpy, onnx and onnx-ir only.
"""

from __future__ import annotations

from snpc.errors import CheckFailed, SnpcError, UserError
from snpc.passes.analyze import Analysis, analyze
from snpc.pipeline.planner import Decision, decide
from snpc.pipeline.prune import Pruned, apply_plan
from snpc.pipeline.report_json import report
from snpc.pipeline.score import score
from snpc.pipeline.search import prune
from snpc.pipeline.verify import verify
from snpc.planning.allocate import make_plan
from snpc.planning.config import Choice
from snpc.planning.plan import Plan, Scores
from snpc.planning.plan_file import plan_from_json, plan_to_json
from snpc.report.page import write_report
from snpc.runtime.calibration import Calibration, ImageOptions, load_calibration
from snpc.runtime.closed_form.fit import Compression, compress
from snpc.runtime.evaluation.bench import Bench, bench
from snpc.runtime.evaluation.latency import Workload
from snpc.runtime.execution.random_inputs import random_calibration
from snpc.runtime.io.examples import write_example
from snpc.runtime.io.load import load
from snpc.runtime.io.save import save
from snpc.runtime.statistics.statistics import Statistics, load_statistics, measure_statistics, save_statistics
from snpc.targets import TARGETS, Build, Widths, artefact, build, widths_for
from snpc.targets import Options as BuildOptions
from snpc.tokens.reduction import reduce_tokens
from snpc.types import Cost, Difference, Group, Model, Pin, Probe, Site, Verdict

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "Analysis",
    "Bench",
    "Build",
    "BuildOptions",
    "Calibration",
    "CheckFailed",
    "Choice",
    "Compression",
    "Cost",
    "Decision",
    "Difference",
    "Group",
    "ImageOptions",
    "Model",
    "Pin",
    "Plan",
    "Probe",
    "Pruned",
    "Scores",
    "Site",
    "SnpcError",
    "Statistics",
    "UserError",
    "Verdict",
    "Widths",
    "Workload",
    "__version__",
    "analyze",
    "apply_plan",
    "artefact",
    "bench",
    "build",
    "compress",
    "decide",
    "load",
    "load_calibration",
    "load_statistics",
    "make_plan",
    "measure_statistics",
    "plan_from_json",
    "plan_to_json",
    "prune",
    "random_calibration",
    "reduce_tokens",
    "report",
    "save",
    "save_statistics",
    "score",
    "verify",
    "widths_for",
    "write_example",
    "write_report",
]
