"""A trial of a plan gives what the whole model gives with all of its groups cut, from whatever plan it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import snpc
from snpc.pipeline.planner import with_closed_form_order
from snpc.pipeline.score import score
from snpc.planning.plan import SlicePlan, cuts_of, top_units
from snpc.runtime.closed_form.fit import closed_form_edits
from snpc.runtime.closed_form.masked_weights import edited_constants, trial_weights
from snpc.runtime.execution.memory import SpillableStore
from snpc.runtime.sensitivity import plan_trials
from snpc.runtime.sensitivity.plan_trials import PlanTrials, TrialWeights, Widths, open_plan_trials, small_batches
from snpc.types import AnyArray
from tests.closed_forms import calibration_of, closed_forms_of, prunable_of
from tests.oracle import analysis_of, feeds_of, run, written

NAMES = ["vit_timm__ts17", "bert__ts17", "llama__ts17"]


def weights_of(name: str) -> TrialWeights:
    closed_forms = closed_forms_of(name)
    uniform = score(analysis_of(name), "magnitude", None, skip=set(closed_forms.kinds))
    scores = with_closed_form_order(uniform, closed_forms, "auto")
    return TrialWeights(closed_forms, scores, prunable_of(analysis_of(name)), SpillableStore(0))


def share_of(name: str, share: float) -> dict[str, int]:
    return {g.id: max(1, round(share * g.size)) for g in prunable_of(analysis_of(name))}


def whole_arrays(name: str, widths: Widths) -> dict[str, AnyArray]:
    """The constants of the plan, solved for all groups at once."""
    weights = weights_of(name)
    groups = prunable_of(analysis_of(name))
    keep = {g.id: top_units(weights.scores.values[g.id], widths[g.id]) for g in groups if widths[g.id] < g.size}
    plan = SlicePlan(analysis_of(name), "", {}, keep, "auto")
    fitted = SlicePlan(
        plan.analysis, "", {}, {k: v for k, v in keep.items() if k in weights.closed_forms.kinds}, "auto"
    )
    edits = closed_form_edits(weights.closed_forms, fitted)
    return trial_weights(weights.source, edited_constants(weights.source, edits), cuts_of(plan))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_all_groups_at_once(name: str) -> None:
    """Also where groups share a constant, as queries, keys and values do."""
    widths = share_of(name, 0.5)
    arrays, expected = weights_of(name).arrays(widths), whole_arrays(name, widths)
    assert set(arrays) == set(expected)
    for constant, array in expected.items():
        np.testing.assert_allclose(arrays[constant], array, rtol=1e-6, atol=1e-7 * float(np.abs(array).max() or 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_that_of_the_whole_model(name: str) -> None:
    widths = share_of(name, 0.5)
    calibration = calibration_of(analysis_of(name), feeds_of(name))
    model = analysis_of(name).traced_graph.model.clone()
    for constant, array in whole_arrays(name, widths).items():
        model.graph.initializers[constant].const_value = ir.Tensor(array, name=constant)
    with open_plan_trials(weights_of(name), calibration) as trials:
        batches = trials.take(99)
        expected = []
        for feeds, batch in zip(small_batches(calibration), batches, strict=True):
            outputs = dict(zip(trials.model.outputs, run(written(model), dict(feeds)), strict=True))
            expected.append(batch.batch.change(outputs))
        assert trials.change(widths, batches) == pytest.approx(float(np.mean(expected)), rel=1e-3)


def test_a_trial_from_another_plan_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[0]
    calibration = calibration_of(analysis_of(name), feeds_of(name))
    start, last = share_of(name, 0.6), max(prunable_of(analysis_of(name)), key=lambda g: (g.layer, g.role == "ffn"))
    moved = {**start, last.id: last.size // 4}
    with open_plan_trials(weights_of(name), calibration) as trials:
        batches = trials.take(1)
        expected = trials.change(moved, batches)
        trials.widths = start
        trials.change(start, batches)
        runs = count_runs(trials, monkeypatch)
        assert trials.change(moved, batches) == pytest.approx(expected, rel=1e-5)
        assert runs == [index for index in range(len(trials.model.segments)) if index >= trials.model.spans[last.id][0]]
        assert 0 < len(runs) < len(trials.model.segments), "what lies before the changed group is not run"


def count_runs(trials: PlanTrials, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the segments that are run from now on."""
    runs: list[int] = []
    kind = type(trials.model.segments[0])
    plain = kind.run

    def counted(session: Any, state: Any, changed: Any = None) -> Any:
        runs.append(trials.model.segments.index(session))
        return plain(session, state, changed)

    monkeypatch.setattr(kind, "run", counted)
    return runs


def test_samples_come_in_small_batches_and_no_more_than_asked() -> None:
    analysis = analysis_of(NAMES[0])
    feeds = {name: np.concatenate([array] * 8)[:11] for name, array in feeds_of(NAMES[0]).items()}
    data = snpc.load_calibration(feeds, analysis.model.inputs, batch=4, held_out=0)
    sizes = [len(next(iter(f.values()))) for f in small_batches(data, samples=8)]
    assert sum(sizes) <= 8 and max(sizes) <= plan_trials.BATCH_SAMPLES
