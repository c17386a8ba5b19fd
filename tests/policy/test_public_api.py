"""The public surface by name: what a user may import, and no more."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise
from pathlib import Path

import snpc

VERBS = ("load", "analyze", "load_calibration", "plan", "apply", "verify", "build", "bench", "prune")
NAMES = {
    # the verbs, in pipeline order, and the one call
    *VERBS,
    # and for a folder
    *("prune_folder", "PrunedFolder"),
    # before planning: inputs, tokens, statistics, scores
    *("random_calibration", "reduce_tokens", "score", "measure_statistics", "load_statistics", "save_statistics"),
    *("dequantize", "restrict"),
    *("solve_closed_forms", "make_slice_plan", "parse_target", "widths_for_target", "timed_artifact"),
    # plans as files
    *("complete_plan", "load_plan", "save_plan", "plan_from_json", "plan_to_json"),
    # results
    *("save", "json_report", "compare_files", "write_report", "write_example"),
    # values
    *("Analysis", "BenchResult", "Budget", "BuildOptions", "BuildResult", "Calibration", "ClosedForms", "Cost"),
    *(
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
        "PrunedModel",
    ),
    *("PruningPlan", "Quality", "RandomInputs", "ResourceTarget", "Site", "SlicePlan", "Statistics"),
    *("TaskMetric", "TextOptions"),
    *("TimingProtocol", "UnitScores", "Verdict", "WorkFolder", "Workload", "TARGETS", "__version__"),
    # errors
    *("CheckFailed", "SnpcError", "UserError"),
}
MAX_PARAMETERS = 8


def test_the_public_names() -> None:
    assert set(snpc.__all__) == NAMES
    assert all(hasattr(snpc, name) for name in NAMES)


def test_every_public_callable_says_what_it_does() -> None:
    for name in NAMES - {"TARGETS", "__version__"}:
        assert inspect.getdoc(getattr(snpc, name)), name


def test_no_verb_takes_too_much() -> None:
    for name in VERBS:
        assert len(inspect.signature(getattr(snpc, name)).parameters) <= MAX_PARAMETERS, name


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    for name in NAMES:
        if inspect.isfunction(getattr(snpc, name)):
            for parameter in inspect.signature(getattr(snpc, name)).parameters.values():
                if re.search(r"\bPath\b", str(parameter.annotation)):
                    assert re.search(r"\bstr\b", str(parameter.annotation)), f"{name}({parameter})"
    folder = str(tmp_path)
    model, data, _ = map(str, snpc.write_example("digits", folder))
    snpc.prune(model, f"{folder}/half.onnx", ratio=0.5)
    assert snpc.verify(model, f"{folder}/half.onnx").quality.random_inputs
    assert snpc.bench([model, f"{folder}/half.onnx"], protocol=snpc.TimingProtocol(0, 1)).timings
    analysis = snpc.analyze(snpc.load(model))
    calibration = snpc.load_calibration(data, analysis.model.inputs, samples=8)
    groups = [group for group in analysis.groups if group.role == "ffn"]
    snpc.save_statistics(snpc.measure_statistics(analysis, calibration, groups), f"{folder}/stats.npz")
    assert snpc.load_statistics(f"{folder}/stats.npz").samples == 8


def test_each_step_takes_what_the_one_before_returned() -> None:
    def first(verb: str) -> str:
        return str(next(iter(inspect.signature(getattr(snpc, verb)).parameters.values())).annotation)

    def returned(verb: str) -> str:
        return str(inspect.signature(getattr(snpc, verb)).return_annotation)

    steps = ("load", "analyze", "plan", "apply")
    for before, after in pairwise(steps):
        assert first(after) == returned(before), (before, after)
    assert returned("apply") == returned("prune") == "PrunedModel"
