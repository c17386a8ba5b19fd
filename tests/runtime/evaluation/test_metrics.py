"""Which metric suits which output: by the graph, by values, and as the user says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import snpc
from snpc.errors import CheckFailed, UserError
from snpc.passes import Analysis
from snpc.passes.output_kinds import OutputKind
from snpc.runtime.evaluation import OutputMetrics, batch_differences, measure_differences, with_metrics
from snpc.runtime.evaluation.metrics import looks_like_logits, metric_of_kind
from tests.models.matchers import matched_points, matcher

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(4, 6, 9))
FLOAT = np.dtype(np.float32)


def softmax(x: Array, axis: int = -1) -> Array:
    return np.asarray(np.exp(x) / np.exp(x).sum(axis, keepdims=True))


@pytest.mark.parametrize(
    ("values", "name", "domain", "axis"),
    [
        (softmax(ROWS), "kl", "probabilities", -1),
        (softmax(ROWS, 1), "kl", "probabilities", -2),
        (np.log(softmax(ROWS)), "kl", "log_probabilities", -1),
        (ROWS / np.linalg.norm(ROWS, axis=-1, keepdims=True), "cosine", "values", -1),
        (ROWS, "relative", "values", -1),
        (np.abs(ROWS), "relative", "values", -1),
    ],
    ids=["probabilities", "probabilities along axis 1", "log-probabilities", "unit length", "any", "positive"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_say_what_the_graph_does_not(values: Array, name: str, domain: str, axis: int, dtype: Any) -> None:
    found = OutputMetrics().for_values({"y": values.astype(dtype)})["y"]
    assert (found.name, found.domain, found.axis) == (name, domain, axis)


def test_values_are_looked_at_once() -> None:
    metrics = OutputMetrics().for_values({"y": ROWS})
    assert metrics.for_values({"y": softmax(ROWS)})["y"].name == "relative"


@pytest.mark.parametrize(
    ("values", "expected"),
    [(8 * (np.eye(9)[RNG.integers(0, 9, 50)] - 1 / 9), True), (ROWS[0] / 3, False), (np.abs(30 * ROWS[0]), False)],
    ids=["confident and centered", "flat", "positive"],
)
def test_a_linear_layer_is_a_classifier_by_its_values(values: Array, expected: bool) -> None:
    assert looks_like_logits(np.asarray(values, np.float64)) == expected
    metrics = OutputMetrics({"y": metric_of_kind(OutputKind("y", "linear"), FLOAT)})
    assert metrics.for_values({"y": values})["y"].name == ("kl" if expected else "relative")


def test_one_class_is_no_distribution() -> None:
    """Otherwise nothing would ever change."""
    metrics = OutputMetrics({"y": metric_of_kind(OutputKind("y", "logits"), FLOAT)})
    assert metrics.for_values({"y": ROWS[..., :1]})["y"].name == "relative"


def test_an_output_without_numbers() -> None:
    with pytest.raises(UserError, match=r"output y: the original has no finite value"):
        OutputMetrics().for_values({"y": np.full((2, 3), np.nan)})


def test_caches_and_integers_are_not_judged() -> None:
    cache, ids = OutputKind("present.0.key", "cache"), OutputKind("ids", "values")
    metrics = OutputMetrics(
        {
            "present.0.key": metric_of_kind(cache, FLOAT),
            "ids": metric_of_kind(ids, np.dtype(np.int64)),
            "y": metric_of_kind(OutputKind("y", "values"), FLOAT),
        }
    ).with_integers_alone()
    before = {"present.0.key": ROWS, "ids": np.arange(4), "y": ROWS}
    after = {"present.0.key": -ROWS, "ids": np.arange(4)[::-1], "y": ROWS}
    assert metrics.change(before, after) == 0
    differences = batch_differences([before], [after], metrics)
    assert [d.drift for d in differences] == [0, 0, 0]
    assert [d.metric for d in differences] == ["none", "none", "relative"]
    with pytest.raises(CheckFailed, match=r"output present\.0\.key: holds NaN"):
        batch_differences([before], [{**after, "present.0.key": ROWS * np.nan}], metrics)


def test_integers_alone_are_judged() -> None:
    """Otherwise a model that returns classes could change in any way."""
    metric = metric_of_kind(OutputKind("classes", "values"), np.dtype(np.int64))
    metrics = OutputMetrics({"classes": metric}).with_integers_alone()
    assert metrics.change({"classes": np.arange(4)}, {"classes": np.array([0, 1, 3, 2])}) == 0.5


# -- entries that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_nan_does_not_hide_others(value: float) -> None:
    """A pruned model that is NaN everywhere once had no drift where the original had one NaN."""
    before = {"y": np.array([[1.0, 2.0, value]])}
    with pytest.raises(CheckFailed, match=r"output y: holds NaN or infinity.*2 of 3 entries"):
        measure_differences(before, {"y": np.full((1, 3), np.nan)})
    with pytest.raises(CheckFailed, match=r"output y: 1 of 3 entries that are NaN or infinite in the original are not"):
        measure_differences(before, {"y": np.array([[1.0, 2.0, 3.0]])})
    (found,) = measure_differences(before, {"y": np.array([[1.0, 3.0, value]])})
    assert found.relative == pytest.approx(1 / np.sqrt(5))


# -- a matcher -------------------------------------------------------------------------------------------------------


@pytest.fixture
def analysis(tmp_path: Path) -> Analysis:
    onnx.save(matcher(), tmp_path / "matcher.onnx")
    return snpc.analyze(snpc.load(tmp_path / "matcher.onnx"))


def test_a_matcher_with_impossible_pairs_is_pruned(analysis: Analysis, tmp_path: Path) -> None:
    """Its output holds minus infinity, of which differences were NaN: curves, plan and drift with them."""
    data = snpc.load_calibration(matched_points(16), analysis.model.inputs, batch=4)
    plan = snpc.plan(analysis, snpc.Budget(target="macs=0.7"), data)
    assert plan.loss_curves and all(np.isfinite(curve).all() for curve in plan.loss_curves.values())
    widths = [plan.slices.kept_width(group) for group in analysis.groups if group.role == "ffn"]
    assert min(widths) > 4  # none is emptied
    result = snpc.apply(plan, tmp_path / "out.onnx")
    (found,) = result.quality.differences
    assert (found.output, found.metric) == ("log_assignment", "kl")
    assert 0 < found.distance < 0.1
    assert found.drift < 0.3  # that of the probabilities


def test_the_assignment_is_judged_by_what_matters(analysis: Analysis) -> None:
    """Entries of -80 are most of the squares, and irrelevant."""
    (dense,) = run_model(analysis)
    changed = np.where(dense < -20, dense * 1.5, dense)
    metrics = OutputMetrics.of(analysis)
    assert metrics.change({"log_assignment": dense}, {"log_assignment": changed}) < 0.01
    finite = np.isfinite(dense)
    assert (
        np.sqrt(np.sum((changed[finite] - dense[finite]) ** 2) / np.sum(dense[finite] ** 2)) > 0.3
    )  # which would decide


def run_model(analysis: Analysis) -> list[Array]:
    import onnxruntime as ort

    session = ort.InferenceSession(analysis.model.path, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, matched_points(4))]


# -- as the user says ------------------------------------------------------------------------------------------------


def test_a_name_for_all_outputs_and_for_one(analysis: Analysis) -> None:
    for request in ("cosine", "log_assignment=cosine", ["log_assignment=cosine"], {"log_assignment": "cosine"}):
        found = OutputMetrics.of(with_metrics(analysis, request))["log_assignment"]
        assert (found.name, found.chosen) == ("cosine", True)
    assert OutputMetrics.of(with_metrics(analysis, "kl:1"))["log_assignment"].axis == 1
    assert with_metrics(analysis, None) is analysis


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("euclid", "choose from kl, relative, cosine, mismatch, none, or give FILE.py:FUNCTION"),
        ("scores=kl", "the model has no output 'scores'; it has log_assignment"),
        (["kl", "cosine"], "given twice for all outputs"),
        ("none", "leaves no output that is judged"),
        ("missing.py:f", "missing.py does not exist"),
    ],
)
def test_what_cannot_be_asked(analysis: Analysis, request_: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        with_metrics(analysis, request_)


def test_an_axis_that_is_not_there(analysis: Analysis) -> None:
    with pytest.raises(UserError, match="the output has 3 axes"):
        OutputMetrics.of(with_metrics(analysis, "kl:3")).for_values({"log_assignment": np.zeros((2, 3, 4))})


def test_a_function_in_a_file(analysis: Analysis, tmp_path: Path) -> None:
    script = tmp_path / "quality.py"
    script.write_text("import numpy as np\ndef distance(a, b):\n    return np.abs(np.exp(a) - np.exp(b)).max((1, 2))\n")
    data = snpc.load_calibration(matched_points(8), analysis.model.inputs, batch=4)
    out = tmp_path / "out.onnx"
    plan = snpc.plan(analysis, snpc.Budget(target="macs=0.8"), data, metric=f"{script}:distance")
    (found,) = snpc.apply(plan, out).quality.differences
    assert found.metric == f"{script}:distance"
    assert 0 < found.distance < 1 and found.drift == found.distance
    again = snpc.verify(analysis.model.path, out, calibration=data, metric=lambda a, b: 0.25 * (a is not b))
    assert again.quality.differences[0].distance == 0.25


def test_a_function_that_fails_names_its_line(analysis: Analysis, tmp_path: Path) -> None:
    script = tmp_path / "quality.py"
    script.write_text("def distance(a, b):\n    return a / None\n")
    metrics = OutputMetrics.of(with_metrics(analysis, f"{script}:distance"))
    with pytest.raises(UserError, match=r"quality.py:distance raised TypeError.*\(line 2\): it should take the orig"):
        metrics.for_values({"log_assignment": ROWS})


def test_a_function_that_is_no_distance(analysis: Analysis) -> None:
    metrics = OutputMetrics.of(with_metrics(analysis, lambda a, b: 1.0))
    with pytest.raises(UserError, match="gives 1 for equal outputs, not 0"):
        metrics.for_values({"log_assignment": ROWS})


def test_a_plan_file_keeps_names_and_runs_no_code(analysis: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    chosen = snpc.plan(analysis, snpc.Budget(ratio=0.5), metric="log_assignment=kl:1")
    snpc.save_plan(chosen, path)
    loaded = snpc.load_plan(path, analysis.model)
    assert loaded.analysis.metrics == chosen.analysis.metrics
    script = tmp_path / "evil.py"
    script.write_text("raise SystemExit('run')\n")
    path.write_text(path.read_text().replace("log_assignment=kl:1", f"{script}:f"))
    with pytest.raises(UserError, match="of the plan: choose from"):
        snpc.load_plan(path, analysis.model)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_limit_is_planned_in_units_of_the_drift(analysis: Analysis) -> None:
    before, after = {"log_assignment": np.log(softmax(ROWS))}, {"log_assignment": np.log(softmax(1.1 * ROWS))}
    plain = OutputMetrics.of(analysis).for_values(before)
    (found,) = measure_differences(before, after, plain)
    assert plain.for_limit().change(before, after) ** plain.drift_exponent == pytest.approx(found.drift)
    chosen = OutputMetrics.of(with_metrics(analysis, "kl")).for_values(before)
    (found,) = measure_differences(before, after, chosen)
    assert found.drift == found.distance
    assert chosen.for_limit().change(before, after) ** chosen.drift_exponent == pytest.approx(found.drift)
