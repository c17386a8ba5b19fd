"""Pruning in rounds: the cubic schedule is the paper's, and an adaptive one takes back what does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import snpc
import snpc.torch
from snpc.cli import main
from snpc.errors import UserError
from snpc.torch import Training, Way
from snpc.torch.schedule import cubic

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB = DATA / "digits_vit.onnx", DATA / "calib.npz"
QUICK = Training(steps=6, batch=16)
SELECT = Way("select", "magnitude")


def data() -> snpc.Calibration:
    return snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32, batch=16)


def macs(path: Path) -> int:
    return snpc.analyze(snpc.load(path)).cost.macs


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_the_cubic_schedule_is_that_of_zhu_and_gupta(rounds: int) -> None:
    final, start, step = 0.6, 0.0, 1.0
    gone = [final + (start - final) * (1 - (t * step) / (rounds * step)) ** 3 for t in range(1, rounds + 1)]
    assert cubic(0.4, rounds) == pytest.approx([1 - s for s in gone])
    assert cubic(0.4, rounds)[-1] == pytest.approx(0.4)


def test_rounds_come_down_to_the_goal(tmp_path: Path) -> None:
    target = tmp_path / "cut.onnx"
    words = ["finetune", VIT, "--teacher", VIT, "--data", CALIB, "--samples", 32, "--batch", 16, "--steps", 4]
    words += ["--schedule", "cubic", "--rounds", 2, "--criterion", "magnitude", "--target", "macs=0.5", "-o", target]
    main([str(w) for w in words], standalone_mode=False)
    assert 0.45 < macs(target) / macs(VIT) <= 0.5
    assert snpc.verify(VIT, target, calibration=data()).drift
    assert [p.name for p in tmp_path.iterdir()] == ["cut.onnx"]


def test_what_does_not_hold_is_taken_back(tmp_path: Path) -> None:
    target, limit = tmp_path / "cut.onnx", 0.1
    found = snpc.torch.prune_adaptively(
        VIT, data(), target, goal="macs=0.2", limit=limit, rounds=2, way=SELECT, training=QUICK
    )
    assert not found[-1].kept or found[-1].macs == pytest.approx(0.2)
    assert {r.kept for r in found} == {True, False}
    reached, step = 1.0, 0.4
    for one in found:
        assert one.macs == pytest.approx(max(0.2, reached - step)) and one.kept == (one.drift <= limit)
        reached, step = (one.macs, step) if one.kept else (reached, step / 2)
    assert macs(target) / macs(VIT) == pytest.approx(reached, abs=0.02)
    assert max(d.relative for d in snpc.verify(VIT, target, calibration=data()).drift) <= limit * 1.01


def test_goals_that_cannot_be_are_refused(tmp_path: Path) -> None:
    run = snpc.torch.prune_adaptively
    with pytest.raises(UserError, match="no cut keeps the drift within 1e-09"):
        run(VIT, data(), tmp_path / "c.onnx", goal="macs=0.5", limit=1e-9, rounds=1, way=SELECT, training=QUICK)
    with pytest.raises(UserError, match="schedules cut MACs"):
        snpc.torch.prune_in_rounds(VIT, data(), tmp_path / "c.onnx", goal="params=0.5")
    assert not list(tmp_path.iterdir())
