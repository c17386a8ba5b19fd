"""Scores on labels equal those of scikit-learn and scipy; commands print them, and prune within them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, top_k_accuracy_score

import snpc
from snpc.errors import UserError
from snpc.runtime.evaluation.task_metrics import TaskMetric, TaskScore, compare_scores, is_task_metric
from tests.command_line import CALIB, DATA, VIT, invoke, reported

EVAL = DATA / "eval.npz"
QUICK = ("--calib", CALIB, "--calib-samples", 32, "--method", "parallel", "--effort", "quick")
RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.standard_normal((60, 7)).astype(np.float32), RNG.integers(0, 7, 60)


def examples() -> tuple[Any, Any]:
    """(pictures, labels) of the evaluation data."""
    with np.load(EVAL) as arrays:
        return arrays["image"], arrays["labels"]


def logits_of(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": examples()[0]})[0]


def score(name: str, output: Any, labels: Any) -> float:
    """In batches, as a model's outputs come."""
    metric = TaskMetric(name)
    return metric.score([metric.reduce(part) for part in np.array_split(output, 3)], labels).value


def test_scores_are_those_of_others() -> None:
    predicted = LOGITS.argmax(-1)
    assert score("top1", LOGITS, LABELS) == pytest.approx((predicted == LABELS).mean())
    assert score("top5", LOGITS, LABELS) == pytest.approx(top_k_accuracy_score(LABELS, LOGITS, k=5, labels=range(7)))
    assert score("f1", LOGITS, LABELS) == pytest.approx(f1_score(LABELS, predicted, average="macro"))
    assert score("top5", LOGITS[:, :3], LABELS % 3) == 1
    numbers = RNG.standard_normal((60, 1))
    assert score("spearman", numbers, LABELS) == pytest.approx(spearmanr(numbers[:, 0], LABELS).statistic)
    a, b = RNG.standard_normal((2, 30, 5))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    pairs = np.stack([a, b], 1).reshape(60, 5)
    assert score("spearman", pairs, LABELS[:30]) == pytest.approx(spearmanr(cosine, LABELS[:30]).statistic)


def test_tokens_without_a_label_do_not_count() -> None:
    logits, labels = LOGITS.reshape(12, 5, 7), LABELS.reshape(12, 5).copy()
    labels[:, 3:] = -100
    known = labels != -100
    predicted = logits.argmax(-1)
    assert score("top1", logits, labels) == pytest.approx((predicted == labels)[known].mean())
    assert score("f1", logits, labels) == pytest.approx(f1_score(labels[known], predicted[known], average="macro"))


def test_the_error_is_that_of_paired_answers() -> None:
    right = np.arange(100) < 80
    worse = right & (np.arange(100) >= 4)
    found = compare_scores(TaskScore(0.8, right), TaskScore(0.76, worse), TaskMetric(), 100, "eval.npz")
    assert found.drop == pytest.approx(4) and found.error == pytest.approx(np.sqrt(0.04 * 0.96 / 99))
    assert compare_scores(TaskScore(0.8), TaskScore(0.7), TaskMetric("spearman"), 100, "").error == 0


@pytest.mark.parametrize(
    ("name", "output", "labels", "words"),
    [
        ("top9", LOGITS, LABELS, "choose from top1, top5, f1, spearman"),
        ("top1", LOGITS[:, 0], LABELS, "an entry per class"),
        ("top1", LOGITS, LABELS[:9], "labels have the shape"),
        ("spearman", LOGITS, LABELS, "a number per label, or embeddings"),
        ("spearman", np.ones((60, 1)), LABELS, "may all be equal"),
    ],
)
def test_what_does_not_fit(name: str, output: Any, labels: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        score(name, output, labels)


def test_functions_of_a_file_are_told_apart_by_their_parameters(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "def score(outputs, labels):\n    return 0.5\n\ndef distance(original, pruned):\n    return 1.0\n"
    )
    assert is_task_metric(f"{script}:score") and not is_task_metric(f"{script}:distance")
    assert is_task_metric("spearman") and not is_task_metric("kl") and not is_task_metric("logits=kl:1")


def test_prune_prints_the_score_of_both_files(tmp_path: Path) -> None:
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    command = ("prune", VIT, "--target", "macs=0.3", *QUICK, "-o", tmp_path / "small.onnx", "--json", report)
    shown = invoke(*command, "--eval", EVAL, "--labels", "labels", "--report", page).stdout
    task = json.loads(report.read_text())["task"]
    assert task["metric"] == "top1" and task["samples"] == len(examples()[1]) and task["error"] > 0
    text = f"top-1 accuracy: {100 * task['before']:.4g} -> {100 * task['after']:.4g} %"
    assert text in shown and text.replace(">", "&gt;") in page.read_text()
    for path, value in ((VIT, task["before"]), (tmp_path / "small.onnx", task["after"])):
        assert (logits_of(path).argmax(-1) == examples()[1]).mean() == pytest.approx(value)


def test_a_drop_in_points_is_met(tmp_path: Path) -> None:
    options = (*QUICK[:-2], "--roles", "ffn", "--eval", EVAL, "--labels", "labels")
    found = reported("prune", VIT, "--max-drop", 5, *options, "-o", tmp_path / "small.onnx")
    assert found["search"]["kind"] == "drop" and found["search"]["limit"] == 5
    assert found["task"]["drop"] == pytest.approx(found["search"]["reached"]) and found["task"]["drop"] <= 5
    assert found["macs"]["after"] < found["macs"]["before"]
    assert list(tmp_path.iterdir()) == [tmp_path / "small.onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "--max-drop", 1), "give --eval DATA --labels NAME"),
        (("prune", "--max-drop", 0, "--eval", EVAL, "--labels", "labels"), "is not above 0"),
        (("prune", "--ratio", 0.1, "--labels", "labels"), "give --eval DATA too"),
        (("prune", "--ratio", 0.1, "--metric", "top5"), "give --eval DATA --labels NAME"),
        (("prune", "--ratio", 0.1, "--metric", "top5", "--eval", EVAL), "give --labels NAME too"),
        (("prune", "--ratio", 0.1, "--metric", "f1", "--metric", "top1", "--eval", EVAL), "keep one"),
        (("plan", "--max-drop", 1), "let `snpc prune` write it"),
        (("prune", "--ratio", 0.1, "--eval", EVAL, "--labels", "none.npy"), "cannot be read as an array"),
    ],
)
def test_requests_that_lack_labels(arguments: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    verb, *options = arguments
    result = invoke(verb, VIT, *QUICK[:-2], *options, "-o", tmp_path / "out", code=2)
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_the_python_call_scores_too(tmp_path: Path) -> None:
    labels, output = examples()[1], tmp_path / "small.onnx"
    data = snpc.load_calibration(EVAL, snpc.load(VIT).inputs, samples=len(labels), held_out=0)
    evaluation = snpc.EvaluationData(data, labels, snpc.TaskMetric("f1"))
    result = snpc.prune(VIT, output, ratio=0.5, evaluation=evaluation)
    assert result.task is not None and result.task.metric == "f1"
    expected = [f1_score(labels, logits_of(path).argmax(-1), average="macro") for path in (VIT, output)]
    assert [result.task.before, result.task.after] == pytest.approx(expected)
