"""Padded tokens do not count: what is measured of padded sequences is what is measured of the sequences alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import snpc
from snpc.passes.canonicalization.finalize import finalize
from snpc.passes.grouping.traced import TracedGraph
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.passes.token_analysis.padding_sources import find_token_streams
from snpc.pipeline.refit import with_refitted_weights
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan, cuts_of, top_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.layerwise import RESIDUAL_DAMPING
from snpc.runtime.closed_form.refit_normalizations import fit_normalizations
from snpc.runtime.closed_form.ridge import RidgeChoice
from snpc.runtime.statistics.statistics import Statistics
from tests.closed_forms import initializers_of, prunable_of
from tests.models.exports import VOCABULARY
from tests.oracle import Array, analysis_of, feeds_of, relative_error, run, written

Feeds = dict[str, Array]
LENGTH, LENGTHS = 9, (9, 4, 6, 7)
NAMES = (
    "bert__ts17",
    "bert__dyn20_sdpa",
    "albert__ts17",
    "gpt2__ts17",
    "llama__ts17",
    "bart__ts17",
    "t5_gated__ts17",
)


def padded(name: str, garbage: int) -> Feeds:
    """One batch of sequences of several lengths; padded places hold ids that ``garbage`` seeds."""
    rng, noise = np.random.default_rng(1), np.random.default_rng(100 + garbage)
    made: Feeds = {}
    mask = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    for key, value in sorted(feeds_of(name).items()):
        shape = (len(LENGTHS), LENGTH)
        if "mask" in key:
            made[key] = mask.astype(value.dtype)
        elif "type" in key:
            made[key] = np.zeros(shape, value.dtype)
        else:
            ids = rng.integers(2, VOCABULARY, shape)
            if "decoder" not in key:
                ids = np.where(mask, ids, noise.integers(2, VOCABULARY, shape))
            made[key] = ids.astype(value.dtype)
    return made


def alone(name: str) -> Iterator[Feeds]:
    """The same sequences, each without its padding."""
    whole = padded(name, 0)
    for k, length in enumerate(LENGTHS):
        yield {key: a[k : k + 1] if "decoder" in key else a[k : k + 1, :length] for key, a in whole.items()}


def calibration(name: str, garbage: int | None) -> Calibration:
    inputs = analysis_of(name).model.inputs
    if garbage is None:
        return snpc.load_calibration(list(alone(name)), inputs, batch=1)
    return snpc.load_calibration(padded(name, garbage), inputs, batch=len(LENGTHS))


def measured(name: str, garbage: int | None, method: str = "auto") -> Statistics:
    analysis = analysis_of(name)
    return snpc.measure_statistics(
        analysis,
        calibration(name, garbage),
        prunable_of(analysis),
        method=method,  # type: ignore[arg-type]
        criterion="snp",
    )


def gap(found: Statistics, expected: Statistics) -> float:
    assert {k: set(v) for k, v in found.sums.items()} == {k: set(v) for k, v in expected.sums.items()}
    return max(
        float(np.abs(array - found.sums[group][name]).max() / np.abs(array).max())
        for group, mine in expected.sums.items()
        for name, array in mine.items()
    )


@pytest.mark.parametrize("method", ["auto", "select"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_sequences_measure_as_unpadded_ones(name: str, method: str) -> None:
    reference = measured(name, None, method)
    assert reference.sums
    assert gap(measured(name, 0, method), reference) < 1e-4
    assert gap(measured(name, 1, method), reference) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_matters(name: str) -> None:
    """The test above can fail: with every token attended to, the same ids measure otherwise."""
    analysis, feeds = analysis_of(name), padded(name, 0)
    feeds = {key: np.ones_like(a) if "mask" in key else a for key, a in feeds.items()}
    data = snpc.load_calibration(feeds, analysis.model.inputs, batch=len(LENGTHS))
    statistics = snpc.measure_statistics(analysis, data, prunable_of(analysis), criterion="snp")
    assert gap(statistics, measured(name, None)) > 1e-2


@pytest.mark.parametrize("name", ["vit_timm__ts17", "swin_timm__ts17", "vit_hf__ts17_sdpa"])
def test_where_no_input_masks_all_tokens_count(name: str) -> None:
    assert not find_token_streams(analysis_of(name).traced_graph).sources


def weights(source: TracedGraph) -> dict[str, Array]:
    return initializers_of(written(finalize(source.model.clone())))


def largest_gap(one: dict[str, Array], two: dict[str, Array]) -> float:
    assert one.keys() == two.keys()
    return max(
        (float(np.abs(a - two[k]).max() / max(np.abs(a).max(), 1e-30)) for k, a in one.items() if a.dtype.kind == "f"),
        default=0.0,
    )


@pytest.mark.parametrize("name", ["bert__ts17", "bart__ts17"])
def test_layers_are_fitted_without_padded_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # padded, the samples are one batch, which has no halves to choose a ridge by
    fixed = RidgeChoice(RESIDUAL_DAMPING, {})
    monkeypatch.setattr("snpc.runtime.closed_form.layerwise.choose_ridge", lambda *_: fixed)
    analysis = analysis_of(name)
    data = [calibration(name, garbage) for garbage in (0, 1, None)]
    decision = snpc.plan(analysis, Budget(0.5, uniform=True), calibration=data[0], method="auto")
    assert decision.closed_forms is not None
    found = [with_refitted_weights(replace(decision, calibration=d)) for d in data]
    cut = [written(rewrite_model(source, cuts_of(plan)).model) for plan, source in found]
    garbage, again, unpadded = (run(model, feeds_of(name)) for model in cut)  # a rotation is free in its signs
    assert relative_error(garbage, again) < 1e-3
    assert relative_error(garbage, unpadded) < 1e-3
    assert relative_error(garbage, run(analysis.model.path, feeds_of(name))) > 1e-2


def test_norms_are_fitted_without_padded_tokens() -> None:
    analysis = analysis_of("gpt2__ts17")
    (group,) = [g for g in analysis.groups if g.role == "residual" and g.prunable]
    keep = top_units(np.random.default_rng(0).normal(size=(group.blocks, group.size)), group.size // 2)
    plan = SlicePlan(analysis, "by hand", {}, {group.id: keep}, "auto")
    first, second, unpadded = (
        weights(fit_normalizations(analysis.traced_graph, plan, calibration("gpt2__ts17", garbage)))
        for garbage in (0, 1, None)
    )
    assert largest_gap(first, second) < 1e-3
    assert largest_gap(first, unpadded) < 1e-3


@pytest.mark.parametrize("name", ["bert__ts17", "gpt2__ts17"])
def test_curves_leave_padded_tokens_out(name: str) -> None:
    """The outputs of padded tokens are there, and move with what stands in their place."""
    analysis = analysis_of(name)
    statistics = measured(name, 0)
    found = [
        snpc.plan(
            analysis,
            Budget(0.5),
            calibration=calibration(name, k),
            statistics=statistics,
            criterion="snp",
            method="auto",
        ).loss_curves
        for k in (0, 1)
    ]
    assert found[0]
    for group, curve in found[0].items():
        np.testing.assert_allclose(found[1][group], curve, rtol=1e-3, atol=1e-9 * curve[0])
