"""What reads a cut stream is fitted to what the dense model makes of the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.planning import PruningMethod
from snpc.runtime.closed_form import cut_stream
from tests.closed_forms import calibration_of
from tests.models.streams import TOKENS, VOCABULARY, write_stream
from tests.oracle import Array, analysis_at, run


def squared_error(expected: list[Array], actual: list[Array]) -> float:
    return float(sum(((a.astype(np.float64) - b) ** 2).sum() for a, b in zip(expected, actual, strict=True)))


def test_it_is_nearer_than_a_fit_on_dense_inputs(tmp_path: Path) -> None:
    """On the data, and on other data."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("layer norm"))
    calibration = calibration_of(analysis, TOKENS)
    others = {"ids": np.random.default_rng(7).integers(0, VOCABULARY, (6, 7))}
    errors: dict[str, list[float]] = {}
    for method in ("parallel", "auto"):
        budget = snpc.Budget(0.5, roles=("residual",))
        result = snpc.apply(
            snpc.plan(analysis, budget, calibration, method=method),  # type: ignore[arg-type]
            tmp_path / f"{method}.onnx",
        )
        errors[method] = [
            squared_error(run(analysis.model.path, feeds), run(result.path, feeds)) for feeds in (TOKENS, others)
        ]
    for dense, cut in zip(errors["parallel"], errors["auto"], strict=True):
        assert cut < 0.95 * dense


def test_a_fit_that_moves_the_outputs_away_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fits that are spoilt, what is left is the fit on dense inputs."""
    analysis = analysis_at(tmp_path / "m.onnx", write_stream("layer norm"))
    calibration = calibration_of(analysis, TOKENS)
    budget = snpc.Budget(0.5, roles=("residual",))

    def outputs(method: PruningMethod) -> list[Array]:
        plan = snpc.plan(analysis, budget, calibration, method=method)
        return run(snpc.apply(plan, tmp_path / f"{method}.onnx").path, TOKENS)

    solve = cut_stream.solve_consumer_refit
    monkeypatch.setattr(cut_stream, "solve_consumer_refit", lambda *args: (-solve(*args)[0], solve(*args)[1]))
    for spoilt, plain in zip(outputs("auto"), outputs("parallel"), strict=True):
        np.testing.assert_array_equal(spoilt, plain)
