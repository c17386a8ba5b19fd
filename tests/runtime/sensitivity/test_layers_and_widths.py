"""Layers and widths in one budget: a layer goes where that changes less than widths at the same cost, only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import snpc
from snpc.pipeline.planner import PlanRequest, measure_widths, plan_of_layers
from snpc.pipeline.refit import with_refitted_weights
from snpc.planning import Budget
from snpc.runtime.execution import DEFAULT_EXECUTION, SpillableStore, temporary_session
from snpc.runtime.sensitivity.layer_search import LayerSearch, LayerSet, best_refitted, measure_candidates
from snpc.runtime.sensitivity.layer_trials import open_layer_trials, set_weights
from snpc.runtime.sensitivity.layers_and_widths import LayersAndWidths
from snpc.runtime.sensitivity.plan_trials import TrialWeights
from tests.command_line import CALIB, VIT, invoke
from tests.models.idle import IDLE, write_idle

ROLES = ("qk", "vo", "ffn", "layer")


@pytest.fixture(scope="module")
def idle_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idle(tmp_path_factory.mktemp("idle") / "idle.onnx")


def test_an_idle_layer_goes_and_widths_serve_the_rest(idle_layer: Path, tmp_path: Path) -> None:
    result = snpc.prune(
        idle_layer, tmp_path / "cut.onnx", calibration=CALIB, target="macs=0.6", roles=ROLES, max_ratio="0.6",
        effort="quick", tokens="none",
    )  # fmt: skip
    assert 0.58 < result.after.macs / result.before.macs <= 0.6
    removal, keep = result.plan.analysis.removal, result.plan.keep
    assert removal is not None and removal.names == (IDLE,)
    assert keep and not any(name.startswith(f"{IDLE}.") for name in keep)
    assert any("1 layer that is gone" in check for check in result.verification.structure)


def test_no_layer_goes_where_widths_change_less(tmp_path: Path) -> None:
    out = invoke("prune", VIT, "--roles", "all,layer", "--target", "macs=0.8", "--effort", "quick", "--calib", CALIB,
                 "-o", tmp_path / "cut.onnx").stdout  # fmt: skip
    assert "layers gone" not in out and "of ffn" in out


def test_a_trial_runs_layers_and_widths_together() -> None:
    """It changes the outputs as the graph without the layer does, with the same weights."""
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, analysis.model.inputs)
    budget = Budget(target="macs=0.6", roles=ROLES)
    widths_only = PlanRequest(replace(budget, roles=ROLES[:3]), effort="quick")
    measured = measure_widths(analysis, widths_only, data, None, DEFAULT_EXECUTION)
    found = measure_candidates(analysis, budget, data)
    weights = TrialWeights(measured.closed_forms, measured.scores, measured.groups, SpillableStore(1 << 30))
    gone = frozenset([found.sublayers[2].name])
    with open_layer_trials(analysis, found.sublayers, found.substitutes, found.batches) as trials:
        search = LayerSearch(found, budget, trials, dict(found.changes))
        together = LayersAndWidths(found, search, weights, measured.scores, measured.groups, DEFAULT_EXECUTION)
        change, widths = together.change(gone), together.widths(gone)
    assert widths is not None
    shorter = found.without(gone)
    model = shorter.traced_graph.model.clone()
    set_weights(model, analysis.traced_graph, weights.arrays(widths))
    with temporary_session(model) as run:
        changes = [b.metrics.change(b.outputs, run(b.feeds), b.token_masks) for b in found.batches]
    assert change == pytest.approx(float(np.mean(changes)), rel=1e-3)
    assert any(widths[g.id] < g.size for g in measured.groups)
    assert all(widths[g.id] == g.size for g in measured.groups if g.id.startswith(f"{found.sublayers[2].name}."))


def test_sets_are_compared_as_they_will_be_refitted() -> None:
    """The change that decides is that of the model that a plan without these layers makes."""
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, analysis.model.inputs)
    request = PlanRequest(Budget(ratio=0.25, roles=("layer",)))
    found = measure_candidates(analysis, request.budget, data)
    names = sorted(found.changes, key=lambda name: found.changes[name])[:2]
    sets = [LayerSet.of(found, frozenset([name])) for name in names]
    changes = {}
    for gone in sets:
        _, source = with_refitted_weights(plan_of_layers(gone.removed(), request, data, DEFAULT_EXECUTION))
        with temporary_session(source.model.clone()) as run:
            changes[gone] = np.mean([b.metrics.change(b.outputs, run(b.feeds), b.token_masks) for b in found.batches])
        assert changes[gone] == pytest.approx(found.change_refitted(gone.names, data, DEFAULT_EXECUTION), rel=1e-3)
        assert changes[gone] < found.changes[next(iter(gone.names))]
    least, most = sorted(sets, key=lambda gone: changes[gone])
    for beside, best in ((0.0, least), (2 * changes[most], most)):
        assert best_refitted({most: 0.0, least: beside}, data, DEFAULT_EXECUTION) == best
