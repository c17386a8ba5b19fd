"""Layers are chosen by what the outputs change, together, and as few go as the budget takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.errors import UserError
from snpc.passes import Companion
from snpc.passes.companions import GraphAlignment
from snpc.planning import Budget
from snpc.runtime.calibration import Calibration
from snpc.runtime.sensitivity import layer_trials
from snpc.runtime.sensitivity.layer_search import remove_layers
from tests.models.residual import WIDTH, linear_layers, random_weights


def with_data(folder: Path, scales: list[float]) -> tuple[snpc.Analysis, Calibration]:
    """Parallel linear layers whose outputs have these scales of one and the same matrix, and data."""
    matrix = next(iter(random_weights(1).values()))
    analysis = snpc.analyze(snpc.load(linear_layers([(scale * matrix).astype(np.float32) for scale in scales])))
    x = np.random.default_rng(1).normal(size=(8, 3, WIDTH)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    return analysis, snpc.load_calibration(folder / "x.npz", analysis.model.inputs)


def branches_gone(analysis: snpc.Analysis) -> set[str]:
    assert analysis.removal is not None
    return {sublayer.branch for sublayer in analysis.removal.sublayers}


def test_the_layer_that_changes_least_goes(tmp_path: Path) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1, 0.7])
    found = remove_layers(analysis, Budget(ratio=0.34, roles=("layer",)), data)
    assert branches_gone(found) == {"b1"}


def test_layers_that_cancel_go_together(tmp_path: Path) -> None:
    """Alone, the third changes least, and it goes first; a swap finds that the other two change nothing together."""
    analysis, data = with_data(tmp_path, [1.0, -1.0, 0.9])
    found = remove_layers(analysis, Budget(ratio=0.67, roles=("layer",)), data)
    assert branches_gone(found) == {"b0", "b1"}


def test_the_mean_stands_for_a_layer_where_that_changes_less(tmp_path: Path) -> None:
    analysis, _ = with_data(tmp_path, [1.0, 0.1])
    np.savez(tmp_path / "far.npz", x=5 + np.random.default_rng(1).normal(size=(8, 3, WIDTH)).astype(np.float32))
    data = snpc.load_calibration(tmp_path / "far.npz", analysis.model.inputs)
    removal = remove_layers(analysis, Budget(ratio=0.5, roles=("layer",)), data).removal
    assert removal is not None
    fed = np.concatenate([feeds["x"] for feeds in data.batches()]).reshape(-1, WIDTH).mean(0)
    expected = fed @ (0.1 * next(iter(random_weights(1).values())))
    np.testing.assert_allclose(removal.substitutes[removal.names[0]].constant, expected, rtol=1e-4)


def test_nothing_stands_for_a_layer_whose_mean_is_worse(tmp_path: Path) -> None:
    """The mean over the tokens of all samples is far from what the samples that are tried have."""
    analysis, _ = with_data(tmp_path, [1.0, 0.1])
    x = np.random.default_rng(1).normal(size=(80, 3, WIDTH)).astype(np.float32)
    x[layer_trials.LAYER_SAMPLES :] += 50
    np.savez(tmp_path / "drifting.npz", x=x)
    data = snpc.load_calibration(tmp_path / "drifting.npz", analysis.model.inputs, batch=80)
    removal = remove_layers(analysis, Budget(ratio=0.5, roles=("layer",)), data).removal
    assert removal is not None and removal.names and not removal.substitutes


def test_as_few_go_as_the_target_takes(tmp_path: Path) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1, 0.2, 0.5])
    for share, gone in (("0.75", {"b1"}), ("0.5", {"b1", "b2"}), ("0.3", {"b1", "b2", "b3"})):
        found = remove_layers(analysis, Budget(target=f"macs={share}", roles=("layer",)), data)
        assert branches_gone(found) == gone


def test_patterns_choose_layers(tmp_path: Path) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1, 0.7])
    names = {s.branch: s.name for s in analysis.sublayers}
    found = remove_layers(analysis, Budget(ratio=0.5, roles=("layer",), exclude=f"^{names['b1']}$"), data)
    assert branches_gone(found) == {"b2"}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(max_drift=0.1, roles=("layer",)), "needs --ratio R, or --target"),
        (Budget(target="latency=0.5", roles=("layer",)), "needs --ratio R, or --target"),
        (Budget(ratio=0.5, roles=("layer",), uniform=True), "--uniform is for widths"),
        (Budget(ratio=0.5, roles=("layer",), include="nothing"), "no layer can go whole"),
    ],
)
def test_budgets_that_layers_cannot_serve(tmp_path: Path, budget: Budget, words: str) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1])
    with pytest.raises(UserError, match=words):
        remove_layers(analysis, budget, data)


def test_an_unreachable_target(tmp_path: Path) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1])
    names = {s.branch: s.name for s in analysis.sublayers}
    with pytest.raises(UserError, match=r"with all layers gone that can go, macs=0\.500 is left"):
        remove_layers(analysis, Budget(target="macs=0.3", roles=("layer",), include=names["b1"]), data)


def test_models_that_are_cut_alike_keep_their_layers(tmp_path: Path) -> None:
    analysis, data = with_data(tmp_path, [1.0, 0.1])
    paired = replace(analysis, companions=(Companion(analysis, GraphAlignment({}, {}, frozenset()), {}),))
    with pytest.raises(UserError, match="not supported for models that are cut alike"):
        remove_layers(paired, Budget(ratio=0.5, roles=("layer",)), data)
