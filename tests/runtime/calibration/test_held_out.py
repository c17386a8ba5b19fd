"""Which samples are held out, and that nothing of them is fed to what fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snpc.runtime.calibration import Calibration, load_calibration
from snpc.runtime.calibration.held_out import MAX_HELD_OUT, count_held_out
from snpc.types import TensorSpec

X = TensorSpec("x", np.dtype(np.float32), ("batch", 1))


def rows(calibration: Calibration | None) -> set[int]:
    if calibration is None:
        return set()
    return {int(row) for feeds in calibration.batches() for row in feeds["x"][:, 0]}


def numbered(count: int, path: Path) -> Path:
    np.savez(path / "data.npz", x=np.arange(count, dtype=np.float32)[:, None])
    return path / "data.npz"


@pytest.mark.parametrize("asked, total, expected", [
    (128, 256, 64),  # left over: as many as help
    (128, 150, 22),
    (128, 128, 13),  # a tenth is taken away
    (1000, 128, 13),
    (128, 130, 13),
    (16, 256, 64),
    (4, 256, 16),  # a short run was asked for
    (16, 16, 4),
    (15, 15, 0),  # too few to take any away
    (8, 10, 2),
])  # fmt: skip
def test_how_many(asked: int, total: int, expected: int) -> None:
    assert count_held_out(asked, total, MAX_HELD_OUT, None) == expected


@pytest.mark.parametrize("asked, total, batch, expected", [(32, 32, 8, 8), (64, 64, 32, 0), (64, 96, 32, 32)])
def test_a_fixed_batch_is_filled_or_left(asked: int, total: int, batch: int, expected: int) -> None:
    assert count_held_out(asked, total, MAX_HELD_OUT, batch) == expected


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 90),
    asked=st.integers(1, 100),
    size=st.sampled_from([0, 1, 3, 8]),
    seed=st.integers(0, 3),
    in_order=st.booleans(),
)
def test_fitted_and_held_out_samples_are_disjoint(total: int, asked: int, size: int, seed: int, in_order: bool) -> None:
    """Of files and of code, with and without a fixed batch: no sample is on both sides, and none is asked for twice."""
    if size > min(total, asked):
        return
    arrays = np.arange(total, dtype=np.float32)[:, None]
    source = [{"x": row[None]} for row in arrays] if in_order else {"x": arrays}
    spec = TensorSpec("x", X.dtype, (size or "batch", 1))
    calibration = load_calibration(source, [spec], samples=asked, seed=seed)
    held_out = calibration.held_out
    assert not rows(calibration) & rows(held_out)
    assert 1 <= len(rows(calibration)) == calibration.samples <= asked
    assert len(rows(held_out)) == (held_out.samples if held_out is not None else 0) <= MAX_HELD_OUT
    if total >= 16 and not size:
        assert held_out is not None and held_out.samples >= min(4, asked)


def test_few_samples_are_all_fitted_to(tmp_path: Path) -> None:
    calibration = load_calibration(numbered(12, tmp_path), [X])
    assert calibration.held_out is None and calibration.samples == 12


def test_what_is_left_over_leaves_the_fitted_samples_as_they_are(tmp_path: Path) -> None:
    path = numbered(200, tmp_path)
    assert rows(load_calibration(path, [X], samples=50)) == rows(load_calibration(path, [X], samples=50, held_out=0))


def test_runs_with_more_samples_hold_out_some_of_the_same(tmp_path: Path) -> None:
    """So that training on all samples is judged on samples that pruning on some of them did not see either."""
    path = numbered(200, tmp_path)
    pruning, training = load_calibration(path, [X], samples=128), load_calibration(path, [X], samples=1 << 16)
    assert len(rows(training.held_out)) == 20 and rows(training.held_out) < rows(pruning.held_out)


def test_the_description_counts_them(tmp_path: Path) -> None:
    path = numbered(200, tmp_path)
    text = load_calibration(path, [X]).describe()
    assert text == f"128 of 200 samples from {path}, 8 per batch, 64 others held out"
    assert "held out" not in load_calibration(path, [X], held_out=0).describe()
