"""Channels that lie in KV caches: rotated where caches begin empty, selected where the data fills them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.pipeline.planner import FILLED_CACHE_REASON
from snpc.runtime.evaluation.cached_decoding import RunningDecoder, cache_interface, cached_decoding_error
from snpc.runtime.execution import file_session
from tests.models.builder_decoders import VOCABULARY, BuilderDecoder
from tests.models.language import Language
from tests.oracle import Array, prunable

BUDGET = snpc.Budget(0.5, uniform=True)
IDS = Language().sample(16, 12)


def pruned_language(folder: Path, cached: bool) -> snpc.PrunedModel:
    path = folder / f"{'with' if cached else 'without'}_caches.onnx"
    onnx.save(Language(cached=cached).model(), path)
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    calibration = snpc.load_calibration({"input_ids": IDS}, analysis.model.inputs)
    return snpc.apply(snpc.plan(analysis, BUDGET, calibration), folder / f"pruned_{path.name}")


def language_feeds(ids: Array) -> dict[str, Array]:
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}


def test_a_file_with_caches_is_fitted_as_the_one_without(tmp_path: Path) -> None:
    """Query, key and value are rotated in both, so both compute the same."""
    plain, cached = (pruned_language(tmp_path, with_caches) for with_caches in (False, True))
    feeds = language_feeds(IDS[:4])
    empty = {f"past_key_values.0.{part}": np.zeros((4, 2, 0, 4), np.float32) for part in ("key", "value")}
    with file_session(plain.path) as run_plain, file_session(cached.path) as run_cached:
        expected, found = run_plain(feeds)["logits"], run_cached({**feeds, **empty})["logits"]
        interface = cache_interface(snpc.load(cached.path))
        assert interface is not None
        decoder = RunningDecoder(interface, run_cached)
        error = cached_decoding_error(decoder, decoder)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert error is not None and error < 1e-5


def filled_data(tmp_path: Path) -> tuple[snpc.Analysis, snpc.Calibration]:
    path = tmp_path / "decoder.onnx"
    onnx.save(Language(cached=True).model(), path)
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    rng = np.random.default_rng(0)
    caches = {f"past_key_values.0.{p}": rng.normal(size=(16, 2, 3, 8)).astype(np.float32) for p in ("key", "value")}
    data = {**language_feeds(IDS), **caches, "attention_mask": np.ones((16, 15), np.int64)}
    return analysis, snpc.load_calibration(data, analysis.model.inputs)


def test_channels_of_filled_caches_are_selected(tmp_path: Path) -> None:
    """The cut caches then hold part of what the data's hold: it is no large change to continue from them."""
    analysis, calibration = filled_data(tmp_path)
    assert {g.freedom for g in prunable(analysis.groups, "qk", "vo")} == {"basis"}
    plan = snpc.plan(analysis, snpc.Budget(0.2, uniform=True), calibration)
    for group in prunable(plan.analysis.groups, "qk", "vo"):
        assert (group.freedom, group.freedom_reason) == ("select", FILLED_CACHE_REASON)
        assert plan.closed_forms is not None and group.id not in plan.closed_forms.bases
    assert snpc.apply(plan).quality.drift < 0.5


def test_a_rotated_plan_is_not_verified_on_filled_caches(tmp_path: Path) -> None:
    analysis, calibration = filled_data(tmp_path)
    empty = snpc.load_calibration({"input_ids": IDS}, analysis.model.inputs)
    plan = snpc.plan(analysis, BUDGET, empty)
    pruned = snpc.apply(plan, tmp_path / "pruned.onnx")
    with pytest.raises(UserError, match="caches have another basis; give data with empty caches"):
        snpc.verify(analysis.model.path, pruned.path, plan=plan, calibration=calibration)


def test_statistics_of_filled_caches_say_so_themselves(tmp_path: Path) -> None:
    """Without the data, what was measured tells which groups are selected."""
    analysis, calibration = filled_data(tmp_path)
    measured = snpc.plan(analysis, BUDGET, calibration, method="parallel")
    again = snpc.plan(analysis, BUDGET, method="parallel", statistics=measured.statistics)
    assert again.slices.keep == measured.slices.keep
    assert {g.freedom for g in prunable(again.analysis.groups, "vo")} == {"select"}


@pytest.mark.parametrize(
    "form", [BuilderDecoder(), BuilderDecoder(packed=False), BuilderDecoder(rotary=0)], ids=["packed", "apart", "plain"]
)
def test_values_inside_a_fused_node_are_rotated(form: BuilderDecoder, tmp_path: Path) -> None:
    """It loses less than selecting them does, and the file decodes step by step as at once."""
    path = form.write(tmp_path / "decoder.onnx")
    analysis = snpc.analyze(snpc.load(path), prune_kv_cache=True)
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (24, 10))
    calibration = snpc.load_calibration({"input_ids": ids}, analysis.model.inputs)
    values = prunable(analysis.groups, "vo")
    assert {(g.cached, analysis.weights[g.id].kind) for g in values} == {(True, "low_rank_vo")}
    budget = snpc.Budget(0.5, ("qk", "vo"), uniform=True)
    rotated = snpc.apply(snpc.plan(analysis, budget, calibration, method="parallel"))
    selected = snpc.apply(snpc.plan(analysis, budget, calibration, method="select"))
    assert rotated.quality.drift < selected.quality.drift
    interface = cache_interface(snpc.load(rotated.path))
    assert interface is not None
    with file_session(rotated.path) as run:
        decoder = RunningDecoder(interface, run)
        error = cached_decoding_error(decoder, decoder)
    assert error is not None and error < 1e-5
