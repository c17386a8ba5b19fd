"""Pruning in rounds: the cubic schedule is the paper's, and an adaptive one takes back what does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from click.testing import CliRunner

import snpc
import snpc.torch
from snpc.cli import main
from snpc.errors import UserError
from snpc.runtime.evaluation.accuracy import EvaluationData
from snpc.torch import AccuracyDrop, DriftLimit, Rounds, TrainingOptions
from snpc.torch.pruning.schedule import cubic_schedule

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB, EVAL = DATA / "digits_vit.onnx", DATA / "calib.npz", DATA / "eval.npz"
QUICK = TrainingOptions(steps=6, batch=16)


def data() -> snpc.Calibration:
    return snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32, batch=16)


def by_magnitude(target: str, count: int) -> Rounds:
    return Rounds(target, count, "select", "magnitude", QUICK)


def macs(path: Path) -> int:
    return snpc.analyze(snpc.load(path)).cost.macs


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_the_cubic_schedule_is_that_of_zhu_and_gupta(rounds: int) -> None:
    final, start, step = 0.6, 0.0, 1.0
    gone = [final + (start - final) * (1 - (t * step) / (rounds * step)) ** 3 for t in range(1, rounds + 1)]
    assert cubic_schedule(0.4, rounds) == pytest.approx([1 - s for s in gone])
    assert cubic_schedule(0.4, rounds)[-1] == pytest.approx(0.4)


def test_rounds_come_down_to_the_goal(tmp_path: Path) -> None:
    target = tmp_path / "cut.onnx"
    words = ["finetune", VIT, "--teacher", VIT, "--data", CALIB, "--samples", 32, "--batch", 16, "--steps", 4]
    words += ["--schedule", "cubic", "--rounds", 2, "--criterion", "magnitude", "--target", "macs=0.5", "-o", target]
    main([str(w) for w in words], standalone_mode=False)
    assert 0.45 < macs(target) / macs(VIT) <= 0.5
    assert snpc.verify(VIT, target, calibration=data()).quality.differences
    assert [p.name for p in tmp_path.iterdir()] == ["cut.onnx"]


def test_what_does_not_hold_is_taken_back(tmp_path: Path) -> None:
    target, limit = tmp_path / "cut.onnx", 0.1
    rounds = snpc.torch.prune_adaptively(VIT, data(), target, by_magnitude("macs=0.2", 2), DriftLimit(limit))
    assert not rounds[-1].kept or rounds[-1].macs == pytest.approx(0.2)
    assert {r.kept for r in rounds} == {True, False}
    reached, step = 1.0, 0.4
    for one in rounds:
        assert one.macs == pytest.approx(max(0.2, reached - step)) and one.kept == (one.drift <= limit)
        reached, step = (one.macs, step) if one.kept else (reached, step / 2)
    assert macs(target) / macs(VIT) == pytest.approx(reached, abs=0.02)
    assert max(d.relative for d in snpc.verify(VIT, target, calibration=data()).quality.differences) <= limit * 1.01


def test_goals_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cut keeps the drift within 1e-09"):
        snpc.torch.prune_adaptively(VIT, data(), tmp_path / "c.onnx", by_magnitude("macs=0.5", 1), DriftLimit(1e-9))
    with pytest.raises(UserError, match="drift limit 0: must be more"):
        DriftLimit(0)
    with pytest.raises(UserError, match="accuracy is measured with labels"):
        AccuracyDrop(0.1, VIT, EvaluationData(data()))
    with pytest.raises(UserError, match="schedules prune MACs, not params"):
        Rounds("params=0.5")
    with pytest.raises(UserError, match="rounds 0: must be at least 1"):
        Rounds("macs=0.5", 0)
    assert not list(tmp_path.iterdir())


def words(target: Path, *more: object) -> list[str]:
    found = ["finetune", VIT, "--teacher", VIT, "--data", CALIB, "--samples", 32, "--batch", 16, "--steps", 4]
    return [str(w) for w in (*found, "-o", target, *more)]


def refused(command: list[str]) -> str:
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    return done.output


ADAPTIVE = ("--schedule", "adaptive", "--rounds", 2, "--criterion", "magnitude", "--target", "macs=0.2")


def right(path: Path) -> float:
    with np.load(EVAL) as arrays:
        return float(
            (ort.InferenceSession(path).run(None, {"image": arrays["image"]})[0].argmax(-1) == arrays["labels"]).mean()
        )


def test_an_adaptive_schedule_can_keep_right_answers(tmp_path: Path) -> None:
    target, report = tmp_path / "cut.onnx", tmp_path / "r.json"
    more = (*ADAPTIVE, "--max-drop", 2, "--eval", EVAL, "--labels", "labels", "--json", report)
    main(words(target, *more), standalone_mode=False)
    rounds = json.loads(report.read_text())["rounds"]
    assert {r["kept"] for r in rounds} == {True, False}
    assert all(r["kept"] == (r["lost"] <= 0.02) for r in rounds)
    last = [r for r in rounds if r["kept"]][-1]
    assert right(VIT) - right(target) == pytest.approx(last["lost"], abs=1e-6)
    assert macs(target) / macs(VIT) == pytest.approx(last["macs"], abs=0.02)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-drift", 0.1, "--max-drop", 0.1), "takes --max-drift, or --max-drop"),
        ((), "takes --max-drift, or --max-drop"),
        (("--max-drop", 0.1), "give all three"),
        (("--max-drop", 0.1, "--eval", EVAL), "give all three"),
        (("--max-drift", 0.1, "--labels", "labels"), "give all three"),
        (("--max-drop", 0.1, "--eval", EVAL, "--labels", "truth"), "holds no 'truth'; it has"),
    ],
)
def test_objectives_that_are_not_whole_are_refused(more: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    assert message in refused(words(tmp_path / "c.onnx", *ADAPTIVE, *more))
    assert "are for --schedule adaptive" in refused(words(tmp_path / "c.onnx", *RUNS["cubic"], "--max-drift", 0.1))
    assert not list(tmp_path.iterdir())


# -- after a kill ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """As many threads as here: sums are split among them."""
    root, threads = str(Path(snpc.__file__).parents[1]), str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


RUNS = {
    "cubic": ("--schedule", "cubic", "--rounds", 3, "--criterion", "magnitude", "--target", "macs=0.4"),
    "cubic, closed forms": ("--schedule", "cubic", "--rounds", 2, "--target", "macs=0.4"),
    "adaptive": (*ADAPTIVE, "--max-drift", 0.15),
    "masks": ("--learn-masks", "vib", "--target", "macs=0.5", "--steps", 30),
}


@pytest.mark.parametrize("name", ["cubic, closed forms", "adaptive", "masks"])
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(name: str, tmp_path: Path, rng: random.Random) -> None:
    """Killed at a random moment, and started again."""
    whole, resumed, folder = tmp_path / "whole.onnx", tmp_path / "resumed.onnx", tmp_path / "state"
    start = time.perf_counter()
    main(words(whole, *RUNS[name]), standalone_mode=False)
    lasts = time.perf_counter() - start
    command = words(resumed, *RUNS[name], "--checkpoint", folder, "--checkpoint-every", 1, "--resume")
    for share in (0.3, 0.1, 0.0):  # a machine that got faster finishes first: then sooner
        shutil.rmtree(folder, ignore_errors=True)
        with subprocess.Popen([sys.executable, "-m", "snpc.cli", *command], env=environment()) as victim:
            while not (folder.is_dir() and any(folder.iterdir())) and victim.poll() is None:
                time.sleep(0.01)
            try:
                victim.wait(rng.uniform(0, share * lasts))
            except subprocess.TimeoutExpired:
                victim.send_signal(signal.SIGKILL)
                break
    assert victim.returncode == -signal.SIGKILL and not resumed.exists()
    subprocess.run([sys.executable, "-m", "snpc.cli", *command], env=environment(), check=True)
    assert resumed.read_bytes() == whole.read_bytes()


def test_checkpoints_of_other_rounds_are_refused(tmp_path: Path) -> None:
    saved = ("--checkpoint", tmp_path / "state")
    main(words(tmp_path / "a.onnx", *RUNS["cubic"], *saved), standalone_mode=False)
    assert "go on from it with --resume" in refused(words(tmp_path / "b.onnx", *RUNS["cubic"], *saved))
    others = words(tmp_path / "b.onnx", *RUNS["adaptive"], *saved, "--resume")
    assert "other models, data or options" in refused(others)
    main(words(tmp_path / "b.onnx", *RUNS["cubic"], *saved, "--resume"), standalone_mode=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["rounds.json", "tuned3.onnx"]
    (tmp_path / "state" / "rounds.json").write_text("[1]")
    assert "not a checkpoint" in refused(words(tmp_path / "c.onnx", *RUNS["cubic"], *saved, "--resume"))


# -- what they find --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cubic", "adaptive"])
def test_the_first_to_go_is_the_unit_that_nothing_reads(schedule: str, tmp_path: Path) -> None:
    """Cut mildly in rounds without training to speak of, so that units can be told by the weights that make them."""
    model = onnx.load(VIT)
    group = next(g for g in snpc.analyze(snpc.load(VIT)).groups if g.role == "ffn" and g.layer == 1)
    tensors = {t.name: t for t in model.graph.initializer}
    (reads,) = (s for s in group.sites if s.kind == "consume")
    array = np.moveaxis(onnx.numpy_helper.to_array(tensors[reads.tensor]).copy(), reads.axis, 0)
    array[7] = 0
    tensors[reads.tensor].CopyFrom(onnx.numpy_helper.from_array(np.moveaxis(array, 0, reads.axis), reads.tensor))
    onnx.save(model, tmp_path / "planted.onnx")
    makes = next(s for s in group.sites if s.kind == "produce")
    before = np.moveaxis(onnx.numpy_helper.to_array(tensors[makes.tensor]), makes.axis, 0)
    rounds = Rounds("macs=0.8", 2, "select", "taylor", TrainingOptions(steps=1, lr=1e-12, batch=16))
    paths = (tmp_path / "planted.onnx", data(), tmp_path / "cut.onnx")
    if schedule == "adaptive":
        snpc.torch.prune_adaptively(*paths, rounds, DriftLimit(0.5))
    else:
        snpc.torch.prune_in_rounds(*paths, rounds)
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "cut.onnx").graph.initializer}
    left = np.moveaxis(after[makes.tensor], makes.axis, 0)
    gaps = np.abs(before[:, None] - left[None]).max(-1).min(1)
    assert gaps[7] > 1e-3 and (gaps < 1e-6).sum() == len(left) > 300
