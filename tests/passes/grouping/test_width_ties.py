"""Keys and values of a node that takes one head size: units of their own, and one width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

import snpc
from snpc.errors import UserError
from snpc.passes.slicing.mask import mask_model
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.planning.plan import cuts_of
from snpc.runtime.evaluation.compare import narrow_caches
from tests.models.builder_decoders import VOCABULARY, BuilderDecoder
from tests.oracle import TOLERANCE, Array, prunable, relative_error, run, written

FORMS = {
    "rotary": BuilderDecoder(),
    "unpacked": BuilderDecoder(packed=False),
    "no_rotary": BuilderDecoder(rotary=0),
    "multi_query": BuilderDecoder(kv_heads=1),
    "half_turns": BuilderDecoder(width=64, rotary=32),
}
OWN_UNITS = ("rotary", "unpacked", "no_rotary", "multi_query")  # half of a head: equal positions


def analysis_of(name: str, folder: Path) -> snpc.Analysis:
    return snpc.analyze(snpc.load(FORMS[name].write(folder / "decoder.onnx")), prune_kv_cache=True)


def decoder_feeds(
    form: BuilderDecoder, width: int, ids: Array, past: dict[str, Array] | None = None
) -> dict[str, Array]:
    """Feeds of one sample [1, tokens] behind ``past``; without one, empty caches of ``width``."""
    empty = np.zeros((1, form.kv_heads, 0, width), np.float32)
    caches = {f"past_key_values.{n}.{part}": empty for n in range(form.layers) for part in ("key", "value")}
    caches |= past or {}
    length = ids.shape[1] + next(iter(caches.values())).shape[2]
    return {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **caches}


@pytest.mark.parametrize("name", OWN_UNITS)
def test_keys_and_values_have_units_of_their_own(name: str, tmp_path: Path) -> None:
    """Keys lose rotary pairs where the node turns them, values channels, in each layer its own; what runs such models
    allocates the caches of all layers alike."""
    form = FORMS[name]
    analysis = analysis_of(name, tmp_path)
    keys, values = prunable(analysis.groups, "qk"), prunable(analysis.groups, "vo")
    pair = 2 if form.rotary else 1
    assert {(g.channels, g.channels * g.step, g.size) for g in keys} == {(pair, 8 * pair, form.width // pair)}
    assert {(g.channels, g.step, g.blocks, g.size) for g in values} == {(1, 8 * pair, form.kv_heads, form.width)}
    assert len(keys) == len(values) == form.layers
    assert len({g.tie for g in (*keys, *values)} - {""}) == 1


def test_where_half_of_a_head_turns_positions_are_equal(tmp_path: Path) -> None:
    analysis = analysis_of("half_turns", tmp_path)
    assert not prunable(analysis.groups, "vo")
    assert not any(g.tie for g in analysis.groups)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.5}, {"ratio": 0.4, "uniform": True}, {"target": "macs=0.7"}, {"ratio": 0.5, "allocator": "dimap"}],
)
def test_planned_widths_run_and_equal_the_mask(name: str, options: dict[str, object], tmp_path: Path) -> None:
    """Whatever chooses the widths, onnxruntime's kernel takes them."""
    analysis, form = analysis_of(name, tmp_path), FORMS[name]
    plan = snpc.plan(analysis, snpc.Budget(**options), method="select")  # type: ignore[arg-type]
    kept = {g.id: plan.slices.kept_width(g) for g in analysis.groups}
    for tie in {g.tie for g in analysis.groups if g.tie}:
        assert len({kept[g.id] * g.channels for g in analysis.groups if g.tie == tie}) == 1
    assert any(kept[g.id] < g.size for g in prunable(analysis.groups, "qk"))
    rewritten = rewrite_model(analysis.traced_graph, cuts_of(plan.slices))
    narrowed = rewritten.sliced_interface()
    rng = np.random.default_rng(0)
    past = {
        name: rng.normal(size=(1, form.kv_heads, 3, form.width)).astype(np.float32)
        for name in decoder_feeds(form, form.width, np.zeros((1, 1), np.int64))
        if name.startswith("past")
    }
    feeds = decoder_feeds(form, form.width, rng.integers(0, VOCABULARY, (1, 5)), past)
    masked = run(written(mask_model(rewritten.source.model, rewritten.source.trace, rewritten.removed)), feeds)
    sliced = run(written(rewritten.model), narrow_caches(feeds, narrowed), "all")
    names = [str(o.name) for o in rewritten.model.graph.outputs]
    expected = narrow_caches(dict(zip(names, masked, strict=True)), narrowed)
    assert relative_error(list(expected.values()), sliced) < TOLERANCE


def test_prefill_and_steps_equal_the_uncached_logits(tmp_path: Path) -> None:
    analysis, form = analysis_of("rotary", tmp_path), FORMS["rotary"]
    pruned = snpc.apply(snpc.plan(analysis, snpc.Budget(0.5), method="select"), tmp_path / "half.onnx")
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 12))
    whole, *_ = run(pruned.path, decoder_feeds(form, 16, ids))
    past: dict[str, Array] = {}
    logits = []
    for part in (ids[:, :7], *np.split(ids[:, 7:], 5, 1)):
        out, *present = run(pruned.path, decoder_feeds(form, 16, part, past))
        logits.append(out)
        names = [f"past_key_values.{n}.{part}" for n in range(form.layers) for part in ("key", "value")]
        past = dict(zip(names, present, strict=True))
    assert past["past_key_values.0.key"].shape == (1, form.kv_heads, 12, 16)
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5)


@pytest.mark.parametrize("budget", [snpc.Budget(0.5, ("qk",)), snpc.Budget(0.5, exclude=r"vo$")])
def test_half_of_a_tie_is_refused(budget: snpc.Budget, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes one head size: give --roles with both roles"):
        snpc.plan(analysis_of("rotary", tmp_path), budget, method="select")


def test_unequal_widths_of_a_file_are_pinned(tmp_path: Path) -> None:
    """No kernel takes them, so nothing is tied, and nothing is cut."""
    text = """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
    step (float[B, N, 16] x, float[B, 4, P, 8] pk, float[B, 4, P, 6] pv)
        => (float[B, N, 16] y, float[B, 4, T, 8] nk, float[B, 4, T, 6] nv) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        c, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, , , , pk, pv)
        y = MatMul(c, wo)
    }"""
    model = parser.parse_model(text)
    for name, shape in {"wq": (16, 32), "wk": (16, 32), "wv": (16, 24), "wo": (24, 16)}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    analysis = snpc.analyze(snpc.load(model), prune_kv_cache=True)
    assert not prunable(analysis.groups, "qk", "vo")
    assert not any(g.tie for g in analysis.groups)
