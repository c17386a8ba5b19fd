"""The segmented model gives what the whole model gives, and runs only the segments that a trial needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from snpc.passes.analyze import Analysis
from snpc.pipeline.planner import with_closed_form_order
from snpc.pipeline.score import score
from snpc.runtime.closed_form.stages import NotSegmentable
from snpc.runtime.execution.memory import SpillableStore, model_weights, session_bytes
from snpc.runtime.execution.session import SessionLoadError
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.sensitivity import segmented_model
from snpc.runtime.sensitivity.loss_curves import measurable_widths, trial_constants
from snpc.runtime.sensitivity.segmented_model import SegmentedModel, open_segmented_model
from snpc.runtime.sensitivity.session_pool import SessionPool
from snpc.types import AnyArray
from tests.closed_forms import closed_forms_of, prunable_of
from tests.oracle import Array, analysis_of, feeds_of, run, written
from tests.patching import patch

VIT = "vit_timm__ts17"
Trials = Mapping[str, Mapping[str, AnyArray]]


def trials_of(name: str, width: int | None = None) -> Trials:
    """Group id -> the constants of a trial at ``width`` (the smallest that is measured by default)."""
    analysis, closed_forms = analysis_of(name), closed_forms_of(name)
    uniform = score(analysis, "magnitude", None, skip=set(closed_forms.kinds))
    scores = with_closed_form_order(uniform, closed_forms, "auto")
    return {
        group.id: trial_constants(closed_forms, scores, group, width or min(measurable_widths(group)))
        for group in prunable_of(analysis)
    }


def outputs_of(analysis: Analysis, feeds: Mapping[str, Array], arrays: Mapping[str, AnyArray]) -> list[Array]:
    """The whole model's outputs, with these contents of constants."""
    model = analysis.traced_graph.model.clone()
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    return run(written(model), dict(feeds))


def assert_same(outputs: list[AnyArray], expected: list[Array]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, reference, rtol=1e-4, atol=1e-5 * float(np.abs(reference).max()))


def dense_outputs(model: SegmentedModel, feeds: Mapping[str, Array]) -> list[AnyArray]:
    states = model.dense_states(feeds, SpillableStore(0))
    return [states[-1][output] for output in model.outputs]


@pytest.mark.parametrize("name", [VIT, "bert__ts17", "bart__ts17", "albert__ts17", "swin_timm__ts17"])
def test_outputs_are_those_of_the_whole_model(name: str) -> None:
    """With the dense weights, and with those of a trial."""
    analysis, feeds, trials = analysis_of(name), feeds_of(name), trials_of(name)
    groups = prunable_of(analysis)
    expected = outputs_of(analysis, feeds, {})
    with open_segmented_model(analysis, trials) as model:
        states = model.dense_states(feeds, SpillableStore(0))
        assert_same([states[-1][output] for output in model.outputs], expected)
        for group in groups[:: max(1, len(groups) // 4)]:
            changed = outputs_of(analysis, feeds, trials[group.id])
            assert_same(list(model.outputs_with(states, group.id, trials[group.id]).values()), changed)
            assert any(not np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(changed, expected, strict=True))


@pytest.mark.parametrize("name", [VIT, "bert__ts17"])
def test_a_model_that_does_not_fit_opens_a_few_segments_at_a_time(name: str) -> None:
    """With the same outputs, and never more than the limit in sessions."""
    analysis, feeds, trials = analysis_of(name), feeds_of(name), trials_of(name)
    limit = int(0.4 * session_bytes(model_weights(analysis.traced_graph.model)))
    held: list[int] = []
    opened = SessionPool.open

    def noted(self: SessionPool, number: int, model: ir.Model) -> None:
        opened(self, number, model)
        held.append(sum(session.size for session in self.opened.values()))

    with pytest.MonkeyPatch.context() as patching:
        for module in ("batches.streamed_model", "sensitivity.segmented_model"):
            patch(patching, f"snpc.runtime.{module}.weight_budget", lambda _: limit)
        patching.setattr(SessionPool, "open", noted)
        with open_segmented_model(analysis, trials) as model:
            assert not held
            states = model.dense_states(feeds, SpillableStore(0))
            assert_same([states[-1][output] for output in model.outputs], outputs_of(analysis, feeds, {}))
            for group in prunable_of(analysis)[::3]:
                changed = outputs_of(analysis, feeds, trials[group.id])
                assert_same(list(model.outputs_with(states, group.id, trials[group.id]).values()), changed)
    assert len(held) > len(model.segments)
    assert max(held) <= limit


def test_every_layer_has_its_own_segments() -> None:
    """Else every trial would run the whole model."""
    groups, trials = prunable_of(analysis_of(VIT)), trials_of(VIT, 1)
    with open_segmented_model(analysis_of(VIT), trials) as model:
        assert len(model.segments) >= 2 * len({group.layer for group in groups})
        for group in groups:
            first, last = model.spans[group.id]
            assert first == last
        starts = {group.layer: model.spans[group.id][0] for group in groups if group.role == "ffn"}
        assert len(set(starts.values())) == len(starts)


def test_segments_cover_the_graph_once_and_in_order() -> None:
    nodes = list(analysis_of(VIT).traced_graph.model.graph)
    with open_segmented_model(analysis_of(VIT), trials_of(VIT, 1)) as model:
        ranges = [(session.segment.first, session.segment.last) for session in model.segments]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(nodes)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_only_weights_that_trials_change_are_inputs() -> None:
    analysis, trials = analysis_of(VIT), trials_of(VIT, 1)
    group = next(g for g in prunable_of(analysis) if g.role == "ffn")
    with open_segmented_model(analysis, {group.id: trials[group.id]}) as model:
        first, last = model.spans[group.id]
        for index, session in enumerate(model.segments):
            inside = first <= index <= last
            assert set(session.weights) == (set(trials[group.id]) if inside else set())
            assert (session.session is session.with_weight_inputs) == (not inside)


def test_a_trial_does_not_run_what_lies_before_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis, feeds, trials = analysis_of(VIT), feeds_of(VIT), trials_of(VIT, 1)
    runs: list[int] = []
    plain = segmented_model.SegmentSession.run

    def counted(session: Any, state: Any, changed: Any = None) -> Any:
        runs.append(session.segment.first)
        return plain(session, state, changed)

    monkeypatch.setattr(segmented_model.SegmentSession, "run", counted)
    last = max(prunable_of(analysis), key=lambda g: (g.layer, g.role == "ffn"))
    with open_segmented_model(analysis, trials) as model:
        states = model.dense_states(feeds, SpillableStore(0))
        assert len(runs) == len(model.segments)
        runs.clear()
        model.outputs_with(states, last.id, trials[last.id])
        start = model.spans[last.id][0]
        assert runs == [session.segment.first for session in model.segments[start:]]
        assert 0 < len(runs) < len(model.segments)


def test_states_hold_only_what_later_segments_read() -> None:
    feeds = feeds_of(VIT)
    with open_segmented_model(analysis_of(VIT), trials_of(VIT, 1)) as model:
        states = model.dense_states(feeds, SpillableStore(0))
        assert len(states) == len(model.segments) + 1
        for session, state in zip(model.segments, states[1:], strict=True):
            assert set(state) <= set(session.segment.live_values)


@pytest.mark.parametrize("failure", [SessionLoadError, NotSegmentable])
def test_a_model_whose_segments_do_not_run_is_one_segment(
    failure: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, feeds, trials = analysis_of(VIT), feeds_of(VIT), trials_of(VIT, 1)
    opened: list[object] = []
    closed: list[object] = []

    class Session:
        """The third one to be opened fails."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.session = temporary_session(*args, **options)

        def __enter__(self) -> Any:
            opened.append(self)
            if len(opened) == 3:
                raise failure("sizes that are not known")
            return self.session.__enter__()

        def __exit__(self, *error: Any) -> Any:
            closed.append(self)
            return self.session.__exit__(*error)

    monkeypatch.setattr("snpc.runtime.sensitivity.segmented_model.temporary_session", Session)
    with open_segmented_model(analysis, trials) as model:
        assert len(closed) == 2, "sessions opened before the failure are closed"
        assert len(model.segments) == 1
        assert set(model.spans.values()) == {(0, 0)}
        assert_same(dense_outputs(model, feeds), outputs_of(analysis, feeds, {}))
    assert len(closed) == len(opened) - 1
