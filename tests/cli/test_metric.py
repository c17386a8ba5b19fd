"""``--metric`` on the commands that judge outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.command_line import invoke, reported
from tests.models.matchers import matched_points, matcher


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "matcher.onnx"
    onnx.save(matcher(), path)
    np.savez(tmp_path / "data.npz", **matched_points(16))  # type: ignore[arg-type]
    return path


@pytest.fixture
def distance(tmp_path: Path) -> str:
    path = tmp_path / "quality.py"
    path.write_text("import numpy as np\ndef distance(a, b):\n    return np.abs(np.exp(a) - np.exp(b)).max((1, 2))\n")
    return f"{path}:distance"


def test_prune_says_what_it_judged_by(model: Path, distance: str, tmp_path: Path) -> None:
    common = ("prune", model, "--target", "macs=0.8", "--calib", tmp_path / "data.npz", "-o", tmp_path / "out.onnx")
    found = reported(*common)
    assert [d["metric"] for d in found["verify"]["quality"]["differences"]] == ["kl"] and found["metric"] is None
    text = invoke(*common).stdout
    assert "KL divergence" in text and "nats" in text
    chosen = reported(*common, "--metric", f"log_assignment={distance}")
    assert chosen["metric"] == {"log_assignment": distance}
    (difference,) = chosen["verify"]["quality"]["differences"]
    assert difference["metric"] == distance and difference["drift"] == difference["distance"]
    assert distance in invoke(*common, "--metric", distance).stdout.replace("\n", "")


def test_a_limit_is_in_units_of_the_metric(model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out.onnx"
    found = reported("prune", model, "--max-drift", 0.02, "--metric", "kl", "--calib", data, "-o", out)
    (difference,) = found["verify"]["quality"]["differences"]
    assert 0 < difference["distance"] == difference["drift"] <= 0.02
    assert found["search"]["unit"] == "by kl"
    invoke("verify", model, out, "--calib", data, "--max-drift", 0.05, "--metric", "kl")
    failed = invoke("verify", model, out, "--calib", data, "--max-drift", 1e-9, "--metric", "kl", code=1)
    assert "more than --max-drift 1e-09" in failed.stderr


def test_a_plan_is_applied_with_its_metric(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    invoke("plan", model, "--ratio", 0.3, "--metric", "log_assignment=cosine", "-o", plan)
    applied = reported("apply", model, plan, "-o", tmp_path / "out.onnx")
    assert [d["metric"] for d in applied["verify"]["quality"]["differences"]] == ["cosine"]


def test_unknown_names_and_outputs_are_refused(model: Path) -> None:
    assert "choose from kl" in invoke("prune", model, "--ratio", 0.3, "--metric", "euclid", code=2).stderr
    missing = invoke("prune", model, "--ratio", 0.3, "--metric", "boxes=kl", code=2).stderr
    assert "it has log_assignment" in missing
